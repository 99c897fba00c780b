'use strict';
const ROW = 44, $ = id => document.getElementById(id), NONE = 0xffffffff;
let D, shown = [], current = -1, texts = null;

// ------------------------------------------------------------------ the data

async function unpack() {
  const text = $('data').textContent, packed = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const kinds = {f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array};
  for (const [name, [kind, start, length]] of Object.entries(head.arrays))
    head[name] = new kinds[kind](buffer, start, length);
  return head;
}

const escapeHtml = s => String(s).replace(/[&<>"']/g, c => '&#' + c.charCodeAt(0) + ';');
const visible = s => s.replace(/ /g, '·').replace(/\n/g, '↵').replace(/\r/g, '␍').replace(/\t/g, '→');
const percent = x => (100 * x < 0.01 && x > 0 ? (100 * x).toExponential(1) : (100 * x).toFixed(x < 0.01 ? 3 : 2)) + '%';
function number(x) {
  if (!isFinite(x)) return '–';
  const size = Math.abs(x);
  if (size && (size < 1e-3 || size >= 1e5)) return x.toExponential(2);
  return String(+x.toPrecision(4));
}
const density = i => D.counts[i] / Math.max(1, D.positions);
const quantile = (i, q) => D.quantiles[i * D.grid + Math.round(q * (D.grid - 1))];

// ------------------------------------------------------- searching and sorting

const ORDERS = {
  number: ['number', (a, b) => a - b],
  density: ['density', (a, b) => D.counts[b] - D.counts[a] || a - b],
  rare: ['rarest first', (a, b) => D.counts[a] - D.counts[b] || a - b],
  name: ['name', (a, b) => D.words[a].replace(/^·/, '').localeCompare(D.words[b].replace(/^·/, '')) || a - b],
  strength: ['typical value', (a, b) => (quantile(b, .5) || 0) - (quantile(a, .5) || 0) || a - b],
  effect: ['effect', (a, b) => Math.abs(D.effects[b]) - Math.abs(D.effects[a]) || a - b],
};

function textsOf(i) {  // what the contexts of a latent say, in small letters; made when it is first searched
  texts = texts || new Array(D.n);
  if (texts[i] === undefined) {
    let text = '';
    for (let c = D.first[i]; c < D.first[i + 1]; c++) {
      if (D.kind === 'images') text += (D.labels[D.sequence[c]] || '') + ' ';
      else for (let t = D.start[c]; t < D.start[c + 1]; t++) text += D.pieces[D.tokens[t]];
      text += '\n';
    }
    texts[i] = text.toLowerCase();
  }
  return texts[i];
}

function place(i, words) {  // 0 best: where all the words are found; -1 nowhere
  const name = D.words[i].toLowerCase();
  if (words.length === 1 && words[0].replace('#', '') === String(i)) return 0;
  if (words.every(w => name.includes(w))) return 1;
  let raised = '';
  if (D.raises) for (let k = 0; k < D.logits; k++) raised += D.pieces[D.raises[i * D.logits + k]].toLowerCase() + ' ';
  if (words.every(w => raised.includes(w))) return 2;
  return words.every(w => textsOf(i).includes(w) || raised.includes(w) || name.includes(w)) ? 3 : -1;
}

function find() {
  const words = $('search').value.toLowerCase().split(/\s+/).filter(Boolean), order = ORDERS[$('sort').value][1];
  const kept = [], places = new Map(), dead = $('dead').checked;
  for (let i = 0; i < D.n; i++) {
    if (!D.counts[i] && !dead) continue;
    const at = words.length ? place(i, words) : 0;
    if (at >= 0) { kept.push(i); places.set(i, at); }
  }
  shown = kept.sort((a, b) => places.get(a) - places.get(b) || order(a, b));
  $('count').textContent = shown.length.toLocaleString('en') + ' latents';
  $('list').scrollTop = 0;
  draw();
}

// --------------------------------------------------------------------- the list

function draw() {
  const list = $('list'), from = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const to = Math.min(shown.length, from + Math.ceil(list.clientHeight / ROW) + 12);
  $('rows').style.height = shown.length * ROW + 'px';
  let html = '';
  for (let r = from; r < to; r++) {
    const i = shown[r], wide = D.counts[i] ? 100 * Math.max(.01, 1 + Math.log10(density(i)) / 6) : 0;
    html += `<div class="row" role="option" id="row-${i}" data-latent="${i}" aria-selected="${i === current}" style="top:${r * ROW}px">` +
      `<b>${i}</b><span class="words">${escapeHtml(D.words[i])}</span>` +
      `<small>${D.counts[i] ? percent(density(i)) : 'dead'}</small><span class="bar"><i style="width:${wide}%"></i></span></div>`;
  }
  $('rows').innerHTML = html;
  if (current >= 0) list.setAttribute('aria-activedescendant', 'row-' + current);
}

function reveal() {
  const r = shown.indexOf(current), list = $('list');
  if (r < 0) return;
  if (r * ROW < list.scrollTop) list.scrollTop = r * ROW;
  else if ((r + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (r + 1) * ROW - list.clientHeight;
}

function step(by) {
  if (!shown.length) return;
  const r = shown.indexOf(current);
  open_(shown[Math.max(0, Math.min(shown.length - 1, r < 0 ? 0 : r + by))]);
}

// -------------------------------------------------------------------- one latent

function open_(i, quiet) {
  current = i;
  if (!quiet) history.replaceState(null, '', '#' + i);
  reveal();
  draw();
  const dead = !D.counts[i], parts = [];
  parts.push(`<h2>Latent ${i} <span>${escapeHtml(D.words[i])}</span><span class="step">` +
    '<button type="button" id="before" aria-label="the one above">↑</button><button type="button" id="after" aria-label="the one below">↓</button></span></h2>');
  if (dead) parts.push(`<p class="soft">It never fired on ${D.positions.toLocaleString('en')} positions.</p>`);
  else {
    parts.push(`<p class="soft">fires on ${percent(density(i))} of ${D.positions.toLocaleString('en')} positions · ` +
      `values 5% ${number(quantile(i, .05))}, 50% ${number(quantile(i, .5))}, 95% ${number(quantile(i, .95))}, ` +
      `largest ${number(quantile(i, 1))}` + (D.effects ? ` · effect ${number(D.effects[i])}` : '') + '</p>' + values(i));
  }
  parts.push(contexts(i, 0, 'Strongest', 'each in another ' + (D.kind === 'images' ? 'image' : 'sequence')));
  if (D.raises) {
    parts.push('<div class="columns">' + logits(i, 'Its direction raises', D.raises, D.raisesBy, '') +
      logits(i, 'and lowers', D.lowers, D.lowersBy, 'down') + '</div>');
  }
  const near = neighbours(i, 'Fires with', D.firesWith, D.firesWithBy) + neighbours(i, 'Points like', D.alike, D.alikeBy);
  if (near) parts.push('<div class="columns">' + near + '</div>');
  parts.push(contexts(i, 1, 'Drawn at random', 'from all places where it fires; the share of its values that are smaller'));
  $('latent').innerHTML = parts.join('');
  $('latent').scrollTop = 0;
  $('before').onclick = () => step(-1);
  $('after').onclick = () => step(1);
}

function values(i) {  // a histogram out of evenly spaced quantiles
  const low = quantile(i, 0), high = quantile(i, 1), W = 460, H = 62, N = 46;
  if (!(high > low)) return '';
  const share = x => {  // of values below x
    const base = i * D.grid;
    let k = 0;
    while (k < D.grid - 2 && D.quantiles[base + k + 1] < x) k++;
    const a = D.quantiles[base + k], b = D.quantiles[base + k + 1];
    return Math.min(1, (k + (b > a ? Math.min(1, Math.max(0, (x - a) / (b - a))) : 1)) / (D.grid - 1));
  };
  const bars = Array.from({length: N}, (_, n) => share(low + (n + 1) * (high - low) / N) - (n ? share(low + n * (high - low) / N) : 0));
  const top = Math.max(...bars);
  let svg = `<svg class="values" viewBox="0 0 ${W} ${H}" width="${W}" height="${H}" role="img" aria-label="histogram of its values">`;
  bars.forEach((b, n) => { svg += `<rect x="${n * W / N}" y="${(H - 14) * (1 - b / top)}" width="${W / N - 1}" height="${(H - 14) * b / top}"/>`; });
  const taken = [[0, 7 * number(low).length], [W - 7 * number(high).length, W]];
  for (const q of [.5, .95]) {
    const x = W * (quantile(i, q) - low) / (high - low);
    svg += `<line x1="${x}" x2="${x}" y1="0" y2="${H - 14}"/>`;
    if (!taken.every(([start, end]) => x + 14 < start || x - 14 > end)) continue;  // no room for its name
    taken.push([x - 14, x + 14]);
    svg += `<text x="${x}" y="${H - 2}" text-anchor="middle">${100 * q}%</text>`;
  }
  return svg + `<text x="0" y="${H - 2}">${number(low)}</text><text x="${W}" y="${H - 2}" text-anchor="end">${number(high)}</text></svg>`;
}

function logits(i, title, ids, by, kind) {
  let most = 0, html = '';
  for (let k = 0; k < D.logits; k++) most = Math.max(most, Math.abs(by[i * D.logits + k]));
  for (let k = 0; k < D.logits; k++) {
    const x = by[i * D.logits + k];
    html += `<code>${escapeHtml(visible(D.pieces[ids[i * D.logits + k]]))}</code><i class="${kind}" style="width:${100 * Math.abs(x) / (most || 1)}%"></i><span>${number(x)}</span>`;
  }
  return `<section><h3>${title}</h3><div class="effects">${html}</div></section>`;
}

function neighbours(i, title, ids, by) {
  if (!ids) return '';
  let html = '';
  for (let k = 0; k < D.near; k++) {
    const other = ids[i * D.near + k];
    if (other !== NONE) html += `<button type="button" data-latent="${other}">${other} <small>${(by[i * D.near + k] / 255).toFixed(2)}</small> ${escapeHtml(D.words[other].split(' ').slice(0, 2).join(' '))}</button>`;
  }
  return html && `<section><h3>${title} <small>cosine</small></h3><div class="near">${html}</div></section>`;
}

function contexts(i, which, title, note) {
  const high = quantile(i, 1);
  let html = '';
  for (let c = D.first[i]; c < D.first[i + 1]; c++) {
    if (D.which[c] !== which) continue;
    html += D.kind === 'images' ? picture(c, high) : line(c, high, which);
  }
  if (!html) return '';
  if (D.kind === 'images') html = `<div class="pictures">${html}</div>`;
  return `<h3>${title} <small>${note}</small></h3>${html}`;
}

function line(c, high, which) {
  let html = '';
  for (let t = D.start[c], n = 0; t < D.start[c + 1]; t++, n++) {
    const v = D.values[t], peak = n === D.peak[c], out = v === 255;
    const piece = escapeHtml(D.pieces[D.tokens[t]].replace(/\n/g, '↵').replace(/\r/g, ''));
    if (!peak && !v && !out) { html += piece; continue; }
    const shade = out ? '' : ` style="background:rgba(var(--shade),${(.72 * v / 254).toFixed(3)})"`;
    html += `<span class="${peak ? 'peak' : out ? 'out' : ''}"${shade} title="${out ? 'the SAE does not act here' : number(v / 254 * high)}">${piece}</span>`;
  }
  const note = number(D.value[c]) + (which ? ` · ${Math.round(100 * D.quantileOf[c])}%` : '');
  return `<div class="context"><small>${note}</small><p>${html}</p></div>`;
}

function picture(c, high) {
  const [leading, rows, columns] = D.patches || [0, 1, 1], at = D.start[c];
  let cells = '';
  if (D.patches) for (let p = 0; p < rows * columns; p++) {
    const v = D.values[at + leading + p];
    if (v && v !== 255) cells += `<rect x="${p % columns}" y="${Math.floor(p / columns)}" width="1" height="1" fill="rgb(235,50,30)" opacity="${(.72 * v / 254).toFixed(2)}"/>`;
  }
  const image = D.pictures[D.picture[c]] ? `<image href="${D.pictures[D.picture[c]]}" width="${columns}" height="${rows}" preserveAspectRatio="none"/>` : '';
  return `<figure><svg viewBox="0 0 ${columns} ${rows}">${image}${cells}</svg>${escapeHtml(D.labels[D.sequence[c]] || '')} ${number(D.value[c])}</figure>`;
}

// ------------------------------------------------------------------------- start

function listen() {
  $('search').addEventListener('input', find);
  $('sort').addEventListener('change', find);
  $('dead').addEventListener('change', find);
  $('list').addEventListener('scroll', draw);
  window.addEventListener('resize', draw);
  window.addEventListener('hashchange', () => { const i = +location.hash.slice(1); if (i >= 0 && i < D.n) open_(i, true); });
  document.addEventListener('click', e => {
    const target = e.target.closest('[data-latent]');
    if (target) open_(+target.dataset.latent);
  });
  document.addEventListener('keydown', e => {
    const typing = e.target.id === 'search', choosing = e.target.tagName === 'SELECT';
    if (e.ctrlKey || e.metaKey || e.altKey || choosing) return;
    if (e.key === '/' && !typing) { e.preventDefault(); $('search').focus(); $('search').select(); }
    else if (e.key === 'Escape' && typing) { $('search').value = ''; find(); $('list').focus(); }
    else if (e.key === 'Enter' && typing && shown.length) { open_(shown[0]); $('list').focus(); }
    else if (e.key === 'ArrowDown' || (e.key === 'j' && !typing)) { e.preventDefault(); step(1); }
    else if (e.key === 'ArrowUp' || (e.key === 'k' && !typing)) { e.preventDefault(); step(-1); }
  });
  $('theme').onclick = () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    root.dataset.theme = dark ? 'light' : 'dark';
  };
}

unpack().then(found => {
  D = found;
  for (const [key, [label]] of Object.entries(ORDERS)) if (key !== 'effect' || D.effects) $('sort').add(new Option(label, key));
  $('sort').value = 'density';
  listen();
  find();
  const asked = location.hash ? +location.hash.slice(1) : -1;
  if (asked >= 0 && asked < D.n) open_(asked, true);
  else if (shown.length) open_(shown[Math.floor(shown.length / 3)], true);
  document.body.dataset.ready = 'yes';
}).catch(error => { $('latent').innerHTML = `<p>This page could not be read: ${escapeHtml(error)}. It needs a browser of 2023 or later.</p>`; throw error; });
