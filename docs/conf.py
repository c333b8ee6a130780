"Settings of Sphinx for the pages that `build.py` lays out; nothing is executed and nothing is fetched."
import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

project, author, copyright = 'circuitbench', 'The circuitbench authors', '2026, The circuitbench authors'
extensions = ['myst_nb']
html_theme, html_title = 'furo', 'circuitbench'
html_static_path, html_css_files, html_extra_path = ['site'], ['site.css'], ['../_docs/extra']
html_copy_source = html_show_sourcelink = html_show_sphinx = False
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'a11y-high-contrast-dark'
html_theme_options = {'source_repository': '', 'top_of_page_buttons': []}

nb_execution_mode = 'off'
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_output_stderr = 'remove'
# A widget's saved state is the HTML beside it: no script from elsewhere draws it.
nb_mime_priority_overrides = [('html', 'application/vnd.jupyter.widget-view+json', None)]
myst_enable_extensions = ['dollarmath', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ['mystnb.unknown_mime_type', 'misc.highlighting_failure']

python_use_unqualified_type_names = True
add_module_names = False
# Types of other packages are named and not linked: their inventories would have to be fetched.
nitpicky = True
nitpick_ignore_regex = [(r'py:.*', r'(?!circuitbench\.).*')]


# What docutils' reader of formulas lacks, in words that it knows.
PLAIN = ((r'\\mathrel\{(.)\}=', r'{\1}{=}'), (r'\\big[lrgm]?\s*(?=[()\[\]|])', ''), (r'\\texttt\b', r'\\mathtt'),
         (r'\\dots\b', r'\\ldots'))


def _plain(text):
    for old, new in PLAIN: text = re.sub(old, new, text)
    return text


def _math(block):
    "A writer of formulas as MathML, which browsers draw by themselves."
    def visit(self, node):
        try: self.body.append(str(tex2mathml(_plain(node.astext()), as_block=block)))
        except (MathError, AttributeError) as err:             # a formula cut short is an AttributeError there
            logger.warning('got the formula %r: %s', node.astext(), err, location=node)
        raise nodes.SkipNode
    return visit


def setup(app):
    "Registers the writer of formulas."
    app.add_html_math_renderer('mathml', (_math(False), None), (_math(True), None))
    app.config.html_math_renderer = 'mathml'
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
