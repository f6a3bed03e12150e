"A folder as a site on this machine, and a page of it in Chromium"
import functools, shutil, tempfile, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

chromium = next(filter(None, map(shutil.which, ('chromium','google-chrome','chromium-browser'))), None)
driver = shutil.which('chromedriver')
flags = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage'''.split()

class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def served(folder):
    "The address of `folder`"
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@contextmanager
def chromium_at(url='about:blank'):
    "A browser with a profile of its own that shows `url`"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    o = webdriver.ChromeOptions()
    o.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as d:
        for f in [*flags, f'--user-data-dir={d}']: o.add_argument(f)
        o.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
        b = webdriver.Chrome(options=o, service=Service(driver))
        b.set_script_timeout(120)
        try:
            b.get(url)
            yield b
        finally: b.quit()
