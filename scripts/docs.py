"""Build the docs site, the one that is tested and published, from the notebooks as nbdev processes them.

    python scripts/docs.py            # build _docs/, then check that every internal link and image resolves
    python scripts/docs.py --readme   # write README.md from nbs/index.ipynb

It stands for nbdev-docs and nbdev-readme, which would need Quarto. Their Markdown is pandoc's, so pandoc
(the pypandoc_binary package) reads these pages; groups of the navigation are where nbdev has them, in nbs/_quarto.yml.
The pages ask nothing of other hosts: one that would fails the build as a broken link does.
"""
import ast, base64, gc, html, html.parser, itertools, json, os, re, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlparse

import pypandoc, yaml
from PIL import Image
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from visible import imports, module

here = Path(__file__).parent/'site'
directive = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)$')
ansi = re.compile(r'\x1b\[[\d;]*m')
dialect = 'markdown-implicit_figures'
pictures = {'image/png': '.png', 'image/jpeg': '.jpg', 'image/svg+xml': '.svg'}

def text(x): return ''.join(x) if isinstance(x, list) else x
def block(s): return f'````{{.output}}\n{ansi.sub("", s).rstrip()}\n````'

def directives(src):
    "Leading `#| name: value` lines of a cell, and the rest of it"
    found,lines = {},src.splitlines()
    while lines and (m:=directive.match(lines[0])):
        found[m[1]] = m[2].strip()
        lines.pop(0)
    return found,'\n'.join(lines).strip('\n')

def picture(data, mime, f, dest, alt):
    "Markdown for the picture in `data`, once it is in the file `f` below `dest`; one with twice the usual dots is shown in the usual size"
    f,raw = f.with_suffix(pictures[mime]),text(data[mime])
    (dest/f).parent.mkdir(exist_ok=True, parents=True)
    (dest/f).write_bytes(raw.encode() if mime.endswith('xml') else base64.b64decode(raw))
    if mime!='image/png': return f'![{alt}]({f.as_posix()})'
    with Image.open(dest/f) as im: fine,w = im.info.get('dpi', (100,))[0]>150,im.width
    broad = '.broad '*(w>1200) # scrolls on a phone, where others shrink
    return f'![{alt}]({f.as_posix()})' + (f'{{{broad}width={w//2}}}' if fine else '')

def output(o, f, dest, alt):
    "Markdown for one output of a cell, in the richest form it has; None if it has nothing to show"
    data = o.get('data', {})
    if o['output_type']=='stream': return block(text(o['text']))
    if o['output_type']=='error': return block(f"{o['ename']}: {o['evalue']}")
    mime = next((m for m in pictures if m in data), None)
    if mime: return picture(data, mime, f, dest, alt)
    if 'text/html' in data: return f"``````{{=html}}\n{text(data['text/html'])}\n``````" # before Markdown, which fastprogress makes of HTML
    if 'text/markdown' in data: return text(data['text/markdown'])
    if 'text/plain' in data: return block(text(data['text/plain']))

def cells_of(fn): return json.loads(fn.read_text(encoding='utf-8'))['cells']

def exported(c):
    "What a reader can unfold of a cell that is exported, so that prose about it does not stand alone; None of another, and of imports"
    if c['cell_type']!='code': return
    d,code = directives(text(c['source']))
    if 'hide' in d or not {'export','exporti'}&{*d}: return
    body = ast.parse(code).body
    if all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in body): return
    names = [f'<code>{o.name}</code>' for o in body if hasattr(o, 'name')]
    return dict(cell_type='markdown', source=folded(' '.join(['Code of',', '.join(names)] if names else ['Code']), code, 'exported'))

def with_exported(cells, raw):
    "The processed `cells` of the notebook with cells `raw`, and what it exports behind what documents that"
    at = {c['id']:i for i,c in enumerate(raw) if 'id' in c}
    waiting,out = [(i,o) for i,c in enumerate(raw) if (o:=exported(c))],[]
    for c in cells:
        while waiting and waiting[0][0]<at.get(c.get('id'), 0): out.append(waiting.pop(0)[1])
        out.append(c)
    return out+[o for _,o in waiting]

def page(fn, dest, raw):
    "Front matter and Markdown of the processed notebook `fn`, from that at `raw`; its pictures go below `dest`"
    meta,out = dict(title=fn.stem, description=''),[]
    for n,c in enumerate(with_exported(cells_of(fn), cells_of(raw))):
        src = text(c['source'])
        if c['cell_type']=='raw' and src.startswith('---'): meta.update(yaml.safe_load(src.strip().strip('-')) or {})
        elif c['cell_type']=='markdown' and not src.startswith('<!-- WARNING'): out.append(src)
        elif c['cell_type']=='code':
            d,code = directives(src)
            if d.get('include')=='false': continue
            if d.get('echo')!='false' and code: out.append(folded(d.get('code-summary', 'Code').strip('"'), code) if d.get('code-fold')=='true' else f'````python\n{code}\n````')
            if d.get('output')=='false': continue
            files = Path(f'{fn.stem}_files')/c.get('id', f'cell{n}')
            out += filter(None, (output(o, files.with_name(f'{files.name}-{i}'), dest, d.get('fig-alt', '').strip('"')) for i,o in enumerate(c.get('outputs', []))))
    return meta,'\n\n'.join(out)+'\n'

def folded(title, code, kind='given'): return f'<details class="{kind}"><summary>{title}</summary>\n\n````python\n{code}\n````\n\n</details>\n\n'

class Links(html.parser.HTMLParser):
    "Ids, internal references, outside files, pictures that say nothing, levels of headings and searchable sections of a page"
    def __init__(self, src):
        super().__init__()
        self.ids,self.refs,self.outside,self.sections,self.inside,self.head = set(),[],[],[],0,None
        self.silent,self.levels = [],[]
        self.feed(src)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        refs = [a[k] for k in ('href','src') if a.get(k)]
        self.refs += [r for r in refs if not urlparse(r).scheme and not urlparse(r).netloc]
        if tag!='a': self.outside += [r for r in refs if urlparse(r).netloc]
        if tag=='img' and not (a.get('alt') or '').strip(): self.silent.append(a['src'])
        if tag=='main': self.inside = 1
        if a.get('class')=='exported': self.inside = -1
        if self.inside>0 and re.fullmatch('h[1-6]', tag):
            self.head = tag
            self.levels.append(int(tag[1]))
            self.sections.append([a.get('id',''), '', ''])
    def handle_endtag(self, tag):
        if tag=='main': self.inside = 0
        if tag=='details' and self.inside<0: self.inside = 1
        if tag==self.head: self.head = None
    def handle_data(self, s):
        if self.inside>0 and self.sections: self.sections[-1][1 if self.head else 2] += s

def broken(pages, site):
    "What is wrong with the references of the built pages"
    for nm,pg in pages.items():
        for ref in pg.outside: yield f'{nm}: {ref} is fetched from another host'
        for src in pg.silent: yield f'{nm}: {src} says nothing to who cannot see it. Put a line "#| fig-alt: ..." on top of its cell'
        for a,b in itertools.pairwise(pg.levels):
            if b>a+1: yield f'{nm}: a heading of level {b} follows one of level {a}'
        for ref in pg.refs:
            u = urlparse(ref)
            to = ((site/nm).parent/unquote(u.path) if u.path else site/nm).resolve()
            found = pages.get(to.relative_to(site).as_posix()) if to.is_relative_to(site) and to.is_file() else None
            if not to.is_file() or (u.fragment and found and unquote(u.fragment) not in found.ids): yield f'{nm}: {ref} leads nowhere'

def globs(contents):
    "The patterns in a list of Quarto's sidebar"
    return [c['auto'] if isinstance(c, dict) else c for c in contents]

def place(nm, sections):
    "Where the notebook at `nm` goes: the numbers of its group and of the pattern in it, as `_quarto.yml` has them"
    for i,s in enumerate(sections):
        for j,p in enumerate(globs(s['contents'])):
            if fnmatch(nm, p): return i,j
    sys.exit(f'{nm} is in no group of the navigation: call it otherwise, or add it to the sidebar in nbs/_quarto.yml')

def nav(pages, here, root):
    "Links to all `pages`, a list of (address, title, group), in their groups; those of modules are open where one is in them"
    link = lambda n,t: f'<li><a href="{root}{n}"{" aria-current=page" if n==here else ""}>{html.escape(t)}</a></li>'
    def group(name, ps):
        shown = any('/' not in n or n==here for n,*_ in ps)
        return f'<details{" open" if shown else ""}><summary>{name}</summary><ul>{"".join(link(n,t) for n,t,_ in ps)}</ul></details>'
    return ''.join(group(g, list(ps)) for g,ps in itertools.groupby(pages, lambda p: p[2]))

def turn(pages, here, root):
    "Links to the pages before and after this one"
    i = [n for n,*_ in pages].index(here)
    link = lambda j,rel: f'<a rel="{rel}" href="{root}{pages[j][0]}"><small>{pages[j][2]}</small>{html.escape(pages[j][1])}</a>' if 0<=j<len(pages) else '<span></span>'
    return link(i-1, 'prev')+link(i+1, 'next')

def to_page(here, link, page_of):
    "Where the `link` that the notebook `here` has to another, as in Jupyter, leads on the site"
    to = Path(os.path.normpath(here.parent/link)).as_posix()
    return os.path.relpath(page_of[to], here.parent) if to in page_of else link

def leveled(out):
    "The page `out` with headings that skip no level: each is one below the nearest before it that was higher"
    above = []
    def level(m):
        if not m[1]:
            while above and above[-1]>=m[2]: above.pop()
            above.append(m[2])
        return f'<{m[1]}h{len(above)}'
    return re.sub(r'<(/?)h([1-6])(?=[\s>])', level, out)

def glossary(outs):
    "The page with the glossary, and from each of its terms that is no everyday word to its id"
    for nm,meta,out in outs:
        if 'everyday' in meta: return nm,{t.lower():i for i,t in re.findall(r'<h2 id="(.*?)">(.*?)</h2>', out) if t not in meta['everyday'].split(', ')}

def explained(out, terms, to):
    "The page `out` with a link to the glossary `to` where its text first has each of `terms`"
    left,silent = dict(terms),0
    find = re.compile(rf"(?<![\w/-])({'|'.join(map(re.escape, sorted(terms, key=len, reverse=True)))})(?![\w/-])", re.I)
    def link(m):
        id = left.pop(m[0].lower(), None)
        return m[0] if id is None else f'<a class="term" href="{to}#{id}">{m[0]}</a>'
    head,main,rest = re.split(r'(?s)(<main.*</main>)', out)
    parts = re.split(r'(<[^>]+>)', main)
    for i,part in enumerate(parts):
        if m:=re.match(r'<(/?)(?:a|code|pre|h[1-6]|math|th|script|style|svg|footer)[\s>]', part): silent += -1 if m[1] else 1
        elif not part.startswith('<') and not silent: parts[i] = find.sub(link, part)
    return head+''.join(parts)+rest

def address(cfg, nm): return f"{cfg.doc_url.rstrip('/')}/{'' if nm=='index.html' else nm}"

def sitemap(cfg, names):
    "All pages, for search engines"
    urls = ''.join(f'<url><loc>{html.escape(address(cfg, n))}</loc></url>\n' for n in names)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'

def render(nm, meta, md, fn, menu, cfg):
    "The page `nm`, as HTML"
    root = '../'*nm.count('/')
    head = dict(title=meta['title'], description=meta['description'], site=cfg.title, root=root, repo=cfg.git_url, address=address(cfg, nm),
        notebook=f'{cfg.branch}/{cfg.nbs_path.name}/{fn.as_posix()}', branch=cfg.branch, project=urlparse(cfg.git_url).path.strip('/'))
    head['description-meta'] = head['description'].replace('`', '')
    out = pypandoc.convert_text(f'---\n{yaml.safe_dump(head)}---\n\n{md}', 'html5', format=dialect, extra_args=[
        '--standalone', '--mathml', '--toc', '--toc-depth=4', f'--template={here/"page.html"}',
        '--variable', f'nav={nav(menu, nm, root)}', '--variable', f'turn={turn(menu, nm, root)}'])
    return leveled(re.sub(r'<table.*?</table>', wide, out, flags=re.S))

def wide(m):
    "A table, which scrolls by itself where it does not fit, whose code may be broken where one would, and in which words are set as words"
    def breakable(c): return re.sub(r'[(=,/]|[.](?=[A-Za-z])', r'\g<0><wbr>', c[0])
    table = re.sub(r'<td>(?=[A-Za-z][^<]{24,}</td>)', '<td class="words">', m[0])
    return f'<div class="wide">{re.sub(r"(?<=<code>)[^<]*(?=</code>)", breakable, table)}</div>'

def index(menu, srcs, pages):
    "All sections of all pages, for search.js; the first of a page has what the page is about, and its keywords"
    for (n,title,group),(_,meta,_,_) in zip(menu, srcs):
        for i,(id,head,body) in enumerate(pages[n].sections):
            first = {} if i else dict(about=meta['description'], keywords=meta.get('keywords', ''))
            yield dict(href=f'{n}#{id}', page=title, group=group, title=head.strip(), **first, text=' '.join(body.split()))

def build():
    cfg = get_config()
    proc,site,url = cfg.config_path/'_proc',cfg.doc_path.resolve(),cfg.doc_url.rstrip('/')
    sections = yaml.safe_load((cfg.nbs_path/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    for d in (proc, site): shutil.rmtree(d, ignore_errors=True)
    proc_nbs(n_workers=0)
    gc.freeze() # each notebook's shell looks for garbage at exit, one after the other
    shutil.copytree(here, site, ignore=shutil.ignore_patterns('page.html'))
    for f in proc.rglob('*.*'): # pictures and files that the pages show or link to
        if f.suffix in ('.png','.jpg','.gif','.svg','.csv','.json'):
            (site/f.relative_to(proc)).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(f, site/f.relative_to(proc))
    srcs = []
    found = (f.relative_to(proc) for f in proc.rglob('*.ipynb'))
    for fn in sorted(found, key=lambda f: (place(f.as_posix(), sections), f)):
        meta,md = page(proc/fn, site/fn.parent, cfg.nbs_path/fn)
        if module(cfg.nbs_path/fn): md = folded('Imports', imports(cfg.nbs_path/fn))+md
        srcs.append(((fn.parent/meta.get('output-file', fn.stem+'.html')).as_posix(), meta, md, fn))
    page_of = {fn.as_posix():nm for nm,_,_,fn in srcs}
    menu = [(n, m['title'].replace('`', ''), sections[place(fn.as_posix(), sections)[0]]['section']) for n,m,_,fn in srcs]
    for nm,*_ in srcs: (site/nm).parent.mkdir(exist_ok=True, parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool: outs = list(pool.map(lambda s: render(*s, menu, cfg), srcs))
    for nm,meta,md,_ in srcs: (site/f'{nm}.md').write_text(f"# {meta['title']}\n\n> {meta['description']}\n\n{md}", encoding='utf-8') # docstrings of modules lead here
    words,terms = glossary((nm,meta,out) for (nm,meta,_,_),out in zip(srcs, outs))
    for (nm,_,_,fn),out in zip(srcs, outs):
        if nm!=words: out = explained(out, terms, '../'*nm.count('/')+words)
        out = re.sub(r'(?<=href=")[^":#]+\.ipynb', lambda m: to_page(fn, m[0], page_of), out)
        (site/nm).write_text(out.replace(f'href="{url}/', f'href="{"../"*nm.count("/")}') if url else out, encoding='utf-8')
    pages = {n: Links((site/n).read_text(encoding='utf-8')) for n,*_ in srcs}
    (site/'search-index.js').write_text(f'const search_index = {json.dumps(list(index(menu, srcs, pages)), indent=0)}\n', encoding='utf-8')
    (site/'sitemap.xml').write_text(sitemap(cfg, pages), encoding='utf-8')
    bad = list(broken(pages, site))
    for b in bad: print(b, file=sys.stderr)
    print(f'{len(srcs)} pages in {cfg.doc_path.name}/')
    return len(bad)

def table_md(m): return pypandoc.convert_text(m[1], 'gfm', format='html', extra_args=['--wrap=none'])

def portable(md, cfg):
    "The Markdown `md` without what GitHub and PyPI take away: tables of pandas and their style, addresses that are relative"
    raw = cfg.git_url.replace('github.com', 'raw.githubusercontent.com')
    md = re.sub(r'<div>\s*<style scoped>.*?</style>\s*(<table.*?</table>)\s*</div>', table_md, md, flags=re.S)
    md = re.sub(r'(?<=<img src=")(?!\w+:)', f'{raw}/{cfg.branch}/', md)
    return re.sub(r'(?<=\]\()(?!\w+:|#)', f"{cfg.doc_url.rstrip('/')}/", md)

def readme():
    cfg = get_config()
    shutil.rmtree(cfg.config_path/f'{Path(cfg.readme_nb).stem}_files', ignore_errors=True)
    meta,md = page(proc_nbs(n_workers=1)/cfg.readme_nb, cfg.config_path, cfg.nbs_path/cfg.readme_nb)
    head = f"# {meta['title']}\n\n" + (f"> {meta['description']}\n\n" if meta['description'] else '')
    md = pypandoc.convert_text(head+md, 'gfm', format=dialect, extra_args=['--wrap=preserve'])
    (cfg.config_path/'README.md').write_text(portable(md, cfg), encoding='utf-8')

if __name__=='__main__':
    lib = get_config().lib_path.name
    if not entry_points(group='nbdev', name=lib): sys.exit(f'{lib} is not installed here, so no name could link to its docs: pip install -e ".[dev]"')
    sys.exit(bool(readme() if '--readme' in sys.argv[1:] else build()))
