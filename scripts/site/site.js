const $ = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)]
function make(tag, attrs, ...children) { const e = Object.assign(document.createElement(tag), attrs); e.append(...children); return e }

// Search. Pages and their sections are in `search_index` (search-index.js), so it works from file:// too.
const q = $('#q'), hits = $('#hits')
let at = 0
function score(s, text, words) {
  const title = s.title.toLowerCase()
  if (!words.every(w => title.includes(w) || s.text.toLowerCase().includes(w))) return 0
  return 1 + 4*(title === text) + 2*title.startsWith(text) + words.filter(w => title.includes(w)).length
}
function show() {
  const text = q.value.trim().toLowerCase(), words = text.split(/\s+/).filter(w => w)
  const found = words.length ? search_index.map(s => [score(s, text, words), s]).filter(o => o[0]).sort((a, b) => b[0]-a[0]).slice(0, 12) : []
  hits.replaceChildren(...found.map(([_, s]) => make('li', {role: 'option'},
    make('a', {href: root+s.href, tabIndex: -1}, s.title || s.page, make('small', {}, s.page + ' – ' + s.text.slice(0, 90))))))
  if (words.length && !found.length) hits.append(make('li', {className: 'none'}, 'Nothing found'))
  hits.hidden = !words.length
  q.setAttribute('aria-expanded', String(!hits.hidden))
  move(0)
}
function move(i) {
  const n = hits.children.length
  at = n ? (i+n)%n : 0;
  [...hits.children].forEach((li, j) => li.setAttribute('aria-selected', String(j === at)))
  if (n) hits.children[at].scrollIntoView({block: 'nearest'})
}
function close() { q.value = ''; show() }
q.addEventListener('input', show)
q.addEventListener('keydown', e => {
  const step = {ArrowDown: 1, ArrowUp: -1}[e.key]
  if (step) { e.preventDefault(); move(at+step) }
  if (e.key === 'Enter') { hits.children[at]?.querySelector('a')?.click(); q.blur() }
})
hits.addEventListener('click', () => setTimeout(close))
document.addEventListener('click', e => { if (!e.target.closest('.search')) hits.hidden = true })
document.addEventListener('keydown', e => {
  if (e.key === '/' && document.activeElement !== q) { e.preventDefault(); q.focus() }
  if (e.key === 'Escape') { close(); q.blur(); menu(false) }
})

// Light and dark: as the system has it, until somebody chooses
$('#theme').addEventListener('click', () => {
  const style = document.documentElement.style, now = style.colorScheme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')
  style.colorScheme = now === 'dark' ? 'light' : 'dark'
  try { localStorage.setItem('theme', style.colorScheme) } catch {}
})

// The list of pages, where there is no room beside the text
function menu(open) { document.body.classList.toggle('menu', open); $('#menu').setAttribute('aria-expanded', String(open)) }
$('#menu').addEventListener('click', () => menu(!document.body.classList.contains('menu')))
const here = $('nav a[aria-current]')
if (here) here.closest('div').scrollTop = here.offsetTop-200

// Links to headings, and buttons that copy code
for (const h of all('main :is(h2,h3,h4)[id]')) h.append(make('a', {className: 'anchor', href: '#'+h.id, ariaLabel: 'Link to here'}, '#'))
for (const div of all('div.sourceCode')) {
  const button = make('button', {className: 'copy', ariaLabel: 'Copy'}, 'copy')
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(div.querySelector('code').innerText)
    button.textContent = 'copied'
    setTimeout(() => { button.textContent = 'copy' }, 1500)
  })
  div.append(button)
}

// Where on the page we are
const toc = new Map(all('aside a').map(a => [decodeURIComponent(a.hash.slice(1)), a]))
const heads = all('main :is(h2,h3,h4)[id]').filter(h => toc.has(h.id))
function spy() {
  const now = heads.filter(h => h.getBoundingClientRect().top < 100).pop()
  toc.forEach((a, id) => a.classList.toggle('now', id === now?.id))
}
document.addEventListener('scroll', spy, {passive: true})
spy()
