"""Every link and anchor of the built pages: broken internal ones fail, external ones are listed and never fetched.

python docs/links.py FOLDER [LIST_OF_EXTERNAL_LINKS]
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

BASE = 'http://site.invalid/'


class Page(HTMLParser):
    "The anchors of a page and what it points to."
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag in ('a', 'area') and a.get('href'): self.links.append(a['href'])
        loads = 'href' if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload') else 'src'
        if a.get(loads): self.loads.append(a[loads])


def check(folder: Path) -> tuple[list[str], list[str], int]:
    "Broken links as sentences, external addresses, and how many internal links there are."
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file()}
    pages = {n: Page(p.read_text(encoding='utf8')) for n, p in files.items() if n.endswith('.html')}
    bad, outside, n = [], set(), 0
    for name, page in pages.items():
        for link in {*page.links, *page.loads}:
            to = urlsplit(urljoin(BASE + name, link))
            if to.scheme in ('data', 'mailto', 'javascript'): continue
            if to.netloc != 'site.invalid':
                if link in page.loads: bad.append(f'{name}: loads {link} from elsewhere')
                outside.add(link)
                continue
            n, path = n + 1, unquote(to.path.lstrip('/')) or 'index.html'
            if path.endswith('/'): path += 'index.html'
            if path not in files: bad.append(f'{name}: {link} is no file')
            elif to.fragment and path in pages and unquote(to.fragment) not in pages[path].anchors:
                bad.append(f'{name}: {link} has no such anchor')
    return bad, sorted(outside), n


def main(folder: str, listed: str = '') -> int:
    "Prints what is broken; returns how much that is."
    bad, outside, n = check(Path(folder))
    if listed: Path(listed).write_text('\n'.join(outside) + '\n', encoding='utf8')
    count = f'{n:,} internal links, {len(bad)} broken; {len(outside)} external ones listed, not fetched'
    print('\n'.join([*bad, count]))
    return len(bad)


if __name__ == '__main__':
    sys.exit(bool(main(*sys.argv[1:])))
