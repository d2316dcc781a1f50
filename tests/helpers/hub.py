"""Serve data sets and models on this machine, as the Hugging Face hub does to its clients.

    with Hub(folder) as hub: ...            serves folder/datasets/OWNER/NAME and folder/OWNER/NAME
    python tests/helpers/hub.py SCRIPT ARGUMENT...  runs a script that finds no other machine

It answers the requests that huggingface_hub 2.4 and datasets 5.2 send. The addresses are those of
https://huggingface.co/docs/hub/api.
"""

import hashlib
import json
import os
import re
import runpy
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = '0123456789' * 4
API = re.compile(
    r'/api/(?:models/|(?=datasets/))(?P<repo>.+?)(?:/(?P<call>revision|tree|paths-info)/(?P<rest>.+))?'
)
FILE = re.compile(r'/(?P<repo>.+?)/resolve/[^/]+/(?P<path>.+)')


def only_this_machine(getaddrinfo):
    """Return a getaddrinfo that fails for other machines.

    A firewall that drops the packets would make the real one wait for ever.
    """

    def look_up(host, *args, **kwargs):
        if host not in (None, 'localhost', '127.0.0.1', '::1', socket.gethostname()):
            raise socket.gaierror(socket.EAI_AGAIN, f'no network in tests: {host}')
        return getaddrinfo(host, *args, **kwargs)

    return look_up


class Hub:
    def __init__(self, folder):
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.folder, self.server.served = Path(folder), []
        self.served = self.server.served  # files sent so far, as REPOSITORY/PATH

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_GET(self):
        address = urlsplit(self.path)
        sent = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
        for pattern, answer in ((API, self.api), (FILE, self.file)):
            found = pattern.fullmatch(unquote(address.path))
            if found and (self.server.folder / found['repo']).is_dir():
                return answer(found, sent)
        self.reply(404, b'', {'X-Error-Code': 'RepoNotFound'})

    do_HEAD = do_POST = do_GET

    def api(self, found, sent):
        repo = self.server.folder / found['repo']
        if found['call'] == 'tree':
            folder = repo / found['rest'].partition('/')[2]
            content = [_entry(path, repo) for path in sorted(folder.iterdir())]
        elif found['call'] == 'paths-info':
            paths = [repo / path for path in parse_qs(sent)['paths']]
            content = [_entry(path, repo) for path in paths if path.exists()]
        else:
            files = [path.relative_to(repo) for path in sorted(repo.rglob('*')) if path.is_file()]
            content = {
                'id': found['repo'].removeprefix('datasets/'),
                'sha': COMMIT,
                'private': False,
                'tags': [],
                'siblings': [{'rfilename': str(path)} for path in files],
            }
        self.reply(200, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def file(self, found, _):
        path = self.server.folder / found['repo'] / found['path']
        if not path.is_file():
            return self.reply(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': COMMIT})
        content, status = path.read_bytes(), 200
        headers = {'ETag': f'"{_digest(path)}"', 'X-Repo-Commit': COMMIT, 'Accept-Ranges': 'bytes'}
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if part:
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
            content, status = content[first : last + 1], 206
        if self.command == 'GET':
            self.server.served.append(f'{found["repo"]}/{found["path"]}')
        self.reply(status, content, headers)

    def reply(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)


def _entry(path, repo):
    name = str(path.relative_to(repo))
    if path.is_file():
        return {'path': name, 'type': 'file', 'size': path.stat().st_size, 'oid': _digest(path)}
    return {'path': name, 'type': 'directory', 'oid': COMMIT}


def _digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


if __name__ == '__main__':
    socket.getaddrinfo = only_this_machine(socket.getaddrinfo)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name='__main__')
