"Pages of the API, read from the source without an import: signatures, docstrings, comments of parameters."
import ast
import re
import tokenize
from dataclasses import dataclass
from inspect import cleandoc
from io import StringIO
from pathlib import Path

Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    "One module as its source says it."
    name: str
    "With dots, such as `circuitbench.models.jamba`."
    tree: ast.Module
    comments: dict[int, str]
    "Line to the comment at its end."
    notebook: str
    "The notebook that exports it, such as `02_edit`; '' for a module written by hand."

    @property
    def doc(self) -> str: return ast.get_docstring(self.tree) or ''

    @property
    def public(self) -> list[str]:
        "The names in `__all__`."
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
                return ast.literal_eval(node.value)
        return []


def read_modules(root: Path) -> dict[str, Module]:
    "Every module that a notebook exports, by name."
    found = {}
    for path in sorted((root/'circuitbench').rglob('*.py')):
        text = path.read_text(encoding='utf8')
        made = re.search(r'File to edit: \S*?nbs/(\S+)\.ipynb', text)
        if not made: continue
        tokens = tokenize.generate_tokens(StringIO(text).readline)
        comments = {t.start[0]: t.string.lstrip('# ') for t in tokens
                    if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip()}
        name = '.'.join(path.relative_to(root).with_suffix('').parts)
        found[name] = Module(name, ast.parse(text), comments, made[1])
    return found


def rst(text: str) -> str:
    "Text as reStructuredText: code in backticks stays code, everything else is taken as it stands."
    parts = re.split(r'(`+)(.+?)\1', text)
    out = []
    for i in range(0, len(parts), 3):
        out.append(re.sub(r'([\\*_|`])', r'\\\1', parts[i]))
        if i + 2 < len(parts): out.append(f'\\ ``{parts[i + 2].strip()}``\\ ')
    return ''.join(out).replace('\n', ' ').strip()


def _indent(lines: list[str]) -> list[str]: return ['   ' + x if x else '' for x in lines]


def _doc(text: str) -> list[str]:
    "A docstring's paragraphs; what is indented or drawn stays as it is."
    out = []
    for part in re.split(r'\n\s*\n', cleandoc(text)):
        if re.search(r'^\s', part, re.M): out += ['::', '', *_indent(part.splitlines()), '']
        else: out += [rst(part), '']
    return out


class _Full(ast.NodeTransformer):
    "Writes the names of this package in full, so that they become links."
    def __init__(self, known: dict[str, str]): self.known = known
    def visit_Name(self, node):
        full = self.known.get(node.id)
        return ast.copy_location(ast.Name(full, node.ctx), node) if full else node


def _names(m: Module, modules: dict[str, Module]) -> dict[str, str]:
    "Classes of this package that a module's annotations can name, in full."
    have = {(k, n.name) for k, x in modules.items() for n in x.tree.body
            if isinstance(n, ast.ClassDef) and n.name in x.public}
    known = {n: f'{m.name}.{n}' for k, n in have if k == m.name}
    for node in ast.walk(m.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            home = '.'.join([*m.name.split('.')[:-node.level], node.module]) if node.level else node.module
            known |= {a.asname or a.name: f'{home}.{a.name}' for a in node.names if (home, a.name) in have}
    return known


def _text(node, full: _Full | None = None) -> str:
    "Source of an expression in one line."
    if full: node = full.visit(ast.parse(ast.unparse(node), mode='eval').body)
    return re.sub(r'\s*\n\s*', ' ', ast.unparse(node))


def _signature(f: Def, full: _Full, bound: bool) -> str:
    "A function's signature, without self."
    a, parts = f.args, []
    every = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(every) - len(a.defaults)) + a.defaults
    def one(arg, default=None, mark=''):
        kind = f': {_text(arg.annotation, full)}' if arg.annotation else ''
        return f'{mark}{arg.arg}{kind}' + (f' = {_text(default)}' if default is not None else '')
    for i, (arg, d) in enumerate(zip(every, defaults)):
        if not (bound and i == 0): parts.append(one(arg, d))
        if a.posonlyargs and i == len(a.posonlyargs) - 1 and not (bound and i == 0): parts.append('/')
    if a.vararg: parts.append(one(a.vararg, mark='*'))
    elif a.kwonlyargs: parts.append('*')
    parts += [one(x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: parts.append(one(a.kwarg, mark='**'))
    return f'({", ".join(parts)})' + (f' -> {_text(f.returns, full)}' if f.returns else '')


def _params(m: Module, f: Def) -> list[str]:
    "What the comments beside the parameters say."
    a = f.args
    args = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    lines = [x.lineno for x in args]
    said = [(x.arg, m.comments[x.end_lineno]) for x in args if x.end_lineno in m.comments
            and lines.count(x.lineno) == 1 and x.lineno > f.lineno and not x.arg.startswith('_')]
    out = [f':param {name}: {rst(text)}' for name, text in said if not text.startswith(('type:', 'noqa'))]
    if f.returns and f.returns.end_lineno in m.comments and f.returns.end_lineno != f.lineno:
        out.append(f':returns: {rst(m.comments[f.returns.end_lineno])}')
    return [*out, ''] if out else []


def _function(m: Module, f: Def, full: _Full, kind: str = 'function') -> list[str]:
    marks = {getattr(d, 'id', getattr(d, 'attr', '')) for d in f.decorator_list}
    if marks & {'property', 'cached_property'}:
        kind_of = [f'   :type: {_text(f.returns, full)}'] if f.returns else []
        return [f'.. py:property:: {f.name}', *kind_of, '', *_indent(_doc(ast.get_docstring(f) or '')), '']
    static = [f'   :{x}:' for x in ('classmethod', 'staticmethod') if x in marks]
    head = f'.. py:{kind}:: {f.name}{_signature(f, full, kind == "method" and "staticmethod" not in marks)}'
    return [head, *static, '', *_indent([*_doc(ast.get_docstring(f) or ''), *_params(m, f)]), '']


def _class(m: Module, c: ast.ClassDef, full: _Full) -> list[str]:
    "A class: its fields with what is said below or beside them, its public methods."
    init = next((x for x in c.body if isinstance(x, Def) and x.name == '__init__'), None)
    bases = [_text(b) for b in c.bases if not _text(b).startswith(('widgets.', 'anywidget.', 'nn.'))]
    body = _doc(ast.get_docstring(c) or '')
    if bases: body += [f'Bases: {", ".join(f"``{b}``" for b in bases)}', '']
    if init: body += _params(m, init)
    fields = []
    for x, after in zip(c.body, [*c.body[1:], None]):
        if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name) and not x.target.id.startswith('_'):
            under = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ''
            said = under if isinstance(under, str) and under else m.comments.get(x.end_lineno, '')
            value = [f'   :value: {_text(x.value)}'] if x.value is not None else []
            fields += [f'.. py:attribute:: {x.target.id}', f'   :type: {_text(x.annotation, full)}', *value, '',
                       *_indent(_doc(said) if said else []), '']
        elif isinstance(x, Def) and not x.name.startswith('_'):
            if any(isinstance(d, ast.Attribute) and d.attr == 'setter' for d in x.decorator_list): continue
            fields += _function(m, x, full, 'method')
    return [f'.. py:class:: {c.name}{_signature(init, full, True) if init else ""}', '', *_indent(body + fields), '']


def page(m: Module, modules: dict[str, Module]) -> str:
    "The page of one module as reStructuredText."
    full, short = _Full(_names(m, modules)), m.name.removeprefix('circuitbench.')
    out = [short, '='*len(short), '', f'.. py:module:: {m.name}', '', *_doc(m.doc),
           f'Told, with examples, in :doc:`nbs/{m.notebook}.ipynb </{m.notebook}>`.', '']
    nodes = {n.name: n for n in m.tree.body if isinstance(n, (*Def.__args__, ast.ClassDef))}
    values = {t.id: n for n in m.tree.body if isinstance(n, ast.Assign | ast.AnnAssign)
              for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)}
    for name in m.public:
        if name in nodes:
            make = _class if isinstance(nodes[name], ast.ClassDef) else _function
            out += make(m, nodes[name], full)
        elif name in values:
            value, said = _text(values[name].value), m.comments.get(values[name].end_lineno, '')
            given = [f'   :value: {value}'] if len(value) < 200 else []
            out += [f'.. py:data:: {name}', *given, '', *_indent(_doc(said) if said else []), '']
    below = [f'``{n}``' for n in m.public if n not in nodes and n not in values]
    if below: out += [f'From modules below: {", ".join(below)}.', '']
    return '\n'.join(out) + '\n'
