"Picture files that Pillow does not write"
import struct, zlib
import numpy as np

passes = (0,0,8,8),(4,0,8,8),(0,4,4,8),(2,0,4,4),(0,2,2,4),(1,0,2,2),(0,1,1,2) # where one begins, and its steps, across and down

def png(w, h, kind, rows, interlaced=False):
    "A PNG file of 8 bits; `kind` is 2 for RGB, 4 for grey with transparency, 6 for RGBA"
    def chunk(k, d): return struct.pack('>I', len(d))+k+d+struct.pack('>I', zlib.crc32(k+d))
    head = struct.pack('>IIBBBBB', w, h, 8, kind, 0, 0, int(interlaced))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')

def interlaced_png(a):
    "An array of bytes as an interlaced PNG, by Adam7"
    parts = [a[y::dy,x::dx] for x,y,dx,dy in passes]
    rows = b''.join(b'\0'+np.ascontiguousarray(r).tobytes() for p in parts if p.size for r in p)
    return png(a.shape[1], a.shape[0], {3:2, 2:4, 4:6}[a.shape[2]], rows, True)

def huge_png(w=10**6, h=10**6): return png(w, h, 2, b'\0'*100)
