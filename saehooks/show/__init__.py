"""Plain values to pictures: notebook HTML, rich for the terminal, matplotlib. Knows no model and no SAE.

>>> from saehooks.show import html, terminal
>>> terminal.render(terminal.table([{"latent": 901, "value": 8.0}])).split()[-2:]
['901', '8']
"""
