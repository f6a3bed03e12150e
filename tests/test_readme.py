"README.md as GitHub and PyPI show it: both take away what they do not know, and leave its text"
import re
from html.parser import HTMLParser
from pathlib import Path
import pytest

pypi = pytest.importorskip('readme_renderer.markdown', reason='readme_renderer shows README.md as PyPI does: pip install -e ".[dev]"')
import comrak, nh3

root = Path(__file__).parent.parent
text = (root/'README.md').read_text(encoding='utf-8')
# What github/markup lets through, besides what nh3 knows by itself
tags = set('h1 h2 h3 h4 h5 h6 br b i strong em a pre code img tt div ins del sup sub p picture ol ul table thead tbody tfoot blockquote dl dt dd kbd q samp var hr tr td th s summary details caption figure figcaption span'.split())
attributes = {'*':{'align','alt','border','height','id','lang','start','title','width'}, 'a':{'href'}, 'img':{'src'}, 'div':{'itemscope'}}

def github(md):
    o,r = comrak.ExtensionOptions(),comrak.RenderOptions()
    o.table = o.strikethrough = o.autolink = o.tasklist = o.tagfilter = r.unsafe_ = True
    return nh3.clean(comrak.render_markdown(md, extension_options=o, render_options=r), tags=tags, attributes=attributes)

class Shown(HTMLParser):
    "Words, links, pictures and cells of a page"
    def __init__(self, html):
        super().__init__()
        self.words,self.links,self.pictures,self.cells = '',[],[],0
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag=='a' and 'href' in a: self.links.append(a['href'])
        if tag=='img': self.pictures.append(a)
        self.cells += tag in ('td','th')
    def handle_data(self, s): self.words += s

@pytest.fixture(params=[pypi.render,github], ids=['pypi','github'])
def render(request): return lambda md: Shown(request.param(md))

def broken(page):
    "Pictures that nobody sees, or that say nothing to who cannot see"
    here = re.compile('https://raw.githubusercontent.com/fastquant-dev/fastquant/main/(.+)')
    return [p for p in page.pictures if not (m:=here.fullmatch(p['src'])) or not (root/m[1]).is_file() or not p.get('alt')]

def test_no_style_is_shown(render):
    page = render(text)
    assert not re.search(r'vertical-align|text-align|[{;]\s*$|<style', page.words.replace('```',''), re.M)
def test_pictures(render):
    page = render(text)
    assert page.pictures and not broken(page)
def test_links_are_absolute(render): assert all(re.match('https://|#', l) for l in render(text).links)
def test_tables_are_tables(render):
    page = render(text)
    rows = [l for l in text.splitlines() if l.startswith('|')]
    assert page.cells>100 and len(rows)>20 and '|--' not in page.words.replace(' ', '') and '<t' not in text

def test_what_is_wrong_is_found(render):
    "A table as pandas writes it, and a picture beside the README"
    page = render('<div>\n<style scoped>\n    th { vertical-align: top; }\n</style>\n</div>\n\n![](index_files/x.png)')
    assert broken(page) and ('vertical-align' in render('th {vertical-align: top;}').words)
