"""Answers over HTTP: `python server.py model.onnx`, with this file beside the `predict.py` of an app, where numpy, Pillow and ONNX Runtime are enough.

    curl --data-binary @photo.jpg http://localhost:8000        # {"cat": 0.97, "dog": 0.03}
    curl -d '{"age": 40, "work": "none"}' http://localhost:8000  # a row, where the model reads tables

Threads share one session; as many answers are computed at once as there are cores, each by one thread. Who waits too long is told so.
For the open internet, put it behind a server that limits connections.
"""
import argparse, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Semaphore

class Handler(BaseHTTPRequestHandler):
    protocol_version,timeout,disable_nagle_algorithm = 'HTTP/1.1',20,True
    def do_GET(self): self.say(200, dict(usage='POST what the model is to answer for.'))
    def do_POST(self):
        n,most = self.headers.get('Content-Length', ''),self.server.most
        if not (n.isascii() and n.isdecimal()): return self.refuse(411, 'Say in Content-Length how many bytes the body has.')
        if int(n)>most: return self.refuse(413, f'The body has {n} bytes, and at most {most} are taken.')
        body = self.rfile.read(int(n))
        if len(body)==int(n): self.say(*self.server.answer(body))
    def refuse(self, status, error):
        "Say what is wrong, and close the connection, as its body has not been read"
        self.close_connection = True
        self.say(status, dict(error=error))
    def say(self, status, said):
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', len(data))
        if self.close_connection: self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args): pass

class Server(ThreadingHTTPServer):
    "Answers by `respond`, from bytes to a status and what JSON can say, `at_once` of them at a time"
    request_queue_size,daemon_threads = 128,True
    def __init__(self, respond, port=8000, at_once=None, wait=10, most=2**24, host='127.0.0.1'):
        super().__init__((host,port), Handler)
        self.respond,self.turn,self.wait,self.most = respond,Semaphore(at_once or os.cpu_count()),wait,most
    def answer(self, body):
        if not self.turn.acquire(timeout=self.wait): return 503,dict(error='Too many ask at once. Ask again later.')
        try: return self.respond(body)
        finally: self.turn.release()

def responder(model, error):
    "What a `Model` answers for a body; `error` is its exception for what cannot be answered"
    def given(body):
        if model.takes!='table': return body
        try: return json.loads(body)
        except ValueError as e: raise error(f'The body is no JSON: {e}.') from None
    def respond(body):
        try: said = model(given(body))
        except error as e: return 400,dict(error=str(e))
        return 200,said.tolist() if hasattr(said, 'tolist') else said
    return respond

if __name__=='__main__':
    from predict import BadInput, Image, Model # with fastquant: from fastquant.runtime import BadInput, Model, and Image from PIL
    Image.MAX_IMAGE_PIXELS = 25_000_000 # pictures of twice as many are refused before they are read
    p = argparse.ArgumentParser()
    p.add_argument('model', nargs='?', default='model.onnx')
    p.add_argument('--port', type=int, default=8000)
    o = p.parse_args()
    server = Server(responder(Model(o.model, threads=1), BadInput), o.port)
    print(f'http://127.0.0.1:{server.server_address[1]}', flush=True)
    try: server.serve_forever()
    except KeyboardInterrupt: pass
