const $ = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)]
function make(tag, attrs, ...children) { const e = Object.assign(document.createElement(tag), attrs); e.append(...children); return e }

// Search. Its index and how it ranks are fetched when somebody begins to search, as scripts, which works from file:// too.
const q = $('#q'), hits = $('#hits')
let at = 0, loaded, shown
function load(name) { return new Promise((done, fail) => document.head.append(make('script', {src: root+name, onload: done, onerror: fail}))) }
function ready() { return loaded ??= load('search-index.js').then(() => load('search.js')) }
function hit(s, i) {
  return make('li', {role: 'option', id: 'hit'+i}, make('a', {href: root+s.href, tabIndex: -1}, s.title || s.page, make('small', {}, s.page + ' – ' + (s.about || s.text).slice(0, 90))))
}
async function show() {
  if (q.value.trim()) await ready()
  const text = q.value.trim(), found = text ? search(text).slice(0, 12) : []
  hits.replaceChildren(...found.map(hit))
  if (text && !found.length) hits.append(make('li', {className: 'none', role: 'status'}, 'Nothing found'))
  hits.hidden = !text
  q.setAttribute('aria-expanded', String(!hits.hidden))
  move(0)
}
function move(i) {
  const n = hits.children.length
  at = n ? (i+n)%n : 0;
  [...hits.children].forEach((li, j) => li.setAttribute('aria-selected', String(j === at)))
  if (n) hits.children[at].scrollIntoView({block: 'nearest'})
  q.setAttribute('aria-activedescendant', n ? hits.children[at].id : '')
}
function close() { q.value = ''; show() }
q.addEventListener('input', () => { shown = show() })
q.addEventListener('focus', ready)
q.addEventListener('keydown', async e => {
  const step = {ArrowDown: 1, ArrowUp: -1}[e.key]
  if (step) { e.preventDefault(); move(at+step) }
  if (e.key === 'Enter') { await shown; hits.children[at]?.querySelector('a')?.click(); q.blur() }
})
hits.addEventListener('click', () => setTimeout(close))
document.addEventListener('click', e => { if (!e.target.closest('.search')) hits.hidden = true })
document.addEventListener('keydown', e => {
  if (e.key === '/' && !document.activeElement.matches('input, textarea')) { e.preventDefault(); q.focus() }
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
if (here) here.closest('nav > div').scrollTop = here.offsetTop-200

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

// What scrolls within the page can be scrolled with keys
for (const o of all('main :is(pre,.wide,p)')) if (o.scrollWidth > o.clientWidth) o.tabIndex = 0

// What can be moved and clicked in lessons
if ($('.play-line, .play-net')) load('play.js')

// Where on the page we are
const toc = new Map(all('aside a').map(a => [decodeURIComponent(a.hash.slice(1)), a]))
const heads = all('main :is(h2,h3,h4)[id]').filter(h => toc.has(h.id))
function spy() {
  const now = heads.filter(h => h.getBoundingClientRect().top < 100).pop()
  toc.forEach((a, id) => a.classList.toggle('now', id === now?.id))
}
document.addEventListener('scroll', spy, {passive: true})
spy()
