"""A stand-in for the Hugging Face Hub on loopback: create, preupload, LFS upload, commit, tree, info, resolve.

It keeps repositories in memory as a list of commits, each a dict of path -> bytes, and logs every request.
"""
import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

LFS = '.safetensors'


def blob(data): return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
def sha256(data): return hashlib.sha256(data).hexdigest()


class Hub:
    "The repositories, and the server in front of them; `fail` maps a part of a path to a status."
    def __init__(self):
        self.repos, self.objects, self.log, self.fail, self.token = {}, {}, [], {}, 'hf_stub'
        handler = type('Handler', (Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url, self.storage = (f'http://{host}:{self.server.server_port}' for host in ('127.0.0.1', 'localhost'))  # another host, as the Hub's is
        Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, repo, files):
        "A commit from outside."
        self.repos.setdefault(repo, []).append({**self.head(repo), **files})

    def head(self, repo): return self.repos[repo][-1] if self.repos.get(repo) else {}
    def sha(self, repo, n): return hashlib.sha1(f'{repo} {n}'.encode()).hexdigest()

    def at(self, repo, revision):
        "Number of the commit that a revision means, None for none."
        n = len(self.repos[repo])
        if revision == 'main': return n - 1
        return next((i for i in range(n) if self.sha(repo, i) == revision), None)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def reply(self, status=200, body=b'', **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), value)
        if 'Content_Length' not in headers: self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def refuse(self, status, code, message='no'): self.reply(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self): self.route()
    def do_HEAD(self): self.route()
    def do_POST(self): self.route()
    def do_PUT(self): self.route()

    def route(self):
        url = urlparse(self.path)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.log.append((self.command, path))
        for part, status in self.hub.fail.items():
            if part in path: return self.refuse(status, 'Failed', 'the server says no')
        if path.startswith(('/lfs/', '/cdn/')): return self.storage(path)
        if path == '/api/validate-yaml': return self.reply(200, {'warnings': [], 'errors': []})
        if self.command in ('POST', 'PUT') and self.headers.get('Authorization') != f'Bearer {self.hub.token}':
            return self.refuse(401, 'Unauthorized', 'Invalid username or password.')
        if path == '/api/repos/create': return self.create()
        parts = path.strip('/').split('/')
        if parts[:2] == ['api', 'models']: return self.api('/'.join(parts[2:4]), parts[4:], query)
        if path.endswith('.git/info/lfs/objects/batch'): return self.batch()
        repo, verb, revision, name = '/'.join(parts[:2]), parts[2], parts[3], '/'.join(parts[4:])
        assert verb == 'resolve', path
        return self.resolve(repo, revision, name)

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos: return self.refuse(409, 'Conflict', 'You already created this model repo')
        self.hub.put(repo, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.reply(200, {'url': f'{self.hub.url}/{repo}', 'private': asked.get('visibility')})

    def api(self, repo, rest, query):
        hub = self.hub
        if repo not in hub.repos: return self.refuse(404, 'RepoNotFound', 'Repository not found')
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ('revision', 'main')
        if (n := hub.at(repo, revision)) is None: return self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        files = hub.repos[repo][n]
        lfs = lambda path: {'sha256': sha256(files[path]), 'oid': sha256(files[path]), 'size': len(files[path]), 'pointerSize': 130}
        if verb == 'revision':
            rows = [{'rfilename': p, 'size': len(d), 'blobId': blob(d)} | ({'lfs': lfs(p)} if p.endswith(LFS) else {}) for p, d in files.items()]
            return self.reply(200, {'id': repo, 'modelId': repo, 'sha': hub.sha(repo, n), 'siblings': rows, 'private': False, 'downloads': 0, 'likes': 0, 'tags': []})
        if verb == 'tree':
            return self.reply(200, [{'type': 'file', 'path': p, 'size': len(d), 'oid': blob(d)} | ({'lfs': lfs(p)} if p.endswith(LFS) else {}) for p, d in files.items()])
        if verb == 'preupload':
            rows = []
            for f in json.loads(self.body)['files']:
                there = files.get(f['path'])
                oid = None if there is None else sha256(there) if f['path'].endswith(LFS) else blob(there)
                rows.append({'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(LFS) else 'regular', 'shouldIgnore': False, 'oid': oid})
            return self.reply(200, {'files': rows})
        if verb == 'commit': return self.commit(repo, n)
        self.refuse(404, 'NoRoute')

    def commit(self, repo, n):
        new = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                if value.get('parentCommit') not in (None, self.hub.sha(repo, n)): return self.refuse(412, 'Conflict', 'A commit has happened since')
            elif item['key'] == 'file': new[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                if value['oid'] not in self.hub.objects: return self.refuse(400, 'Missing', 'LFS object was not uploaded')
                new[value['path']] = self.hub.objects[value['oid']]
        self.hub.put(repo, new)
        sha = self.hub.sha(repo, n + 1)
        self.reply(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'})

    def batch(self):
        rows = []
        for f in json.loads(self.body)['objects']:
            row = {'oid': f['oid'], 'size': f['size']}
            if f['oid'] not in self.hub.objects:
                row['actions'] = {'upload': {'href': f"{self.hub.url}/lfs/{f['oid']}"}, 'verify': {'href': f"{self.hub.url}/lfs/{f['oid']}/verify"}}
            rows.append(row)
        self.reply(200, {'transfer': 'basic', 'objects': rows})

    def storage(self, path):
        oid = path.split('/')[2]
        if self.command == 'PUT':
            if sha256(self.body) != oid: return self.refuse(400, 'Corrupt')
            self.hub.objects[oid] = self.body
            return self.reply(200)
        if path.endswith('/verify'): return self.reply(200 if oid in self.hub.objects else 404, {})
        self.reply(200, self.hub.objects[oid])

    def resolve(self, repo, revision, name):
        hub = self.hub
        if repo not in hub.repos: return self.refuse(404, 'RepoNotFound', 'Repository not found')
        if (n := hub.at(repo, revision)) is None: return self.refuse(404, 'RevisionNotFound')
        if name not in hub.repos[repo][n]: return self.refuse(404, 'EntryNotFound', f'{name} does not exist')
        data, sha = hub.repos[repo][n][name], hub.sha(repo, n)
        if name.endswith(LFS):
            oid = sha256(data)
            hub.objects[oid] = data
            return self.reply(302, Location=f'{hub.storage}/cdn/{oid}', X_Repo_Commit=sha, X_Linked_Etag=f'"{oid}"', X_Linked_Size=str(len(data)))
        self.reply(200, data, X_Repo_Commit=sha, ETag=f'"{blob(data)}"', Content_Length=str(len(data)))
