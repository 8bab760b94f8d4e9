"""What a trace shows in a notebook: its page, kept apart."""

import html
import re

from hand_made import make_rank, make_run

from txcore.profiling.trace.show.page import to_page
from txcore.profiling.trace.trace import measure_ranks


def test_a_trace_is_its_page_in_a_sandboxed_frame():
    trace = measure_ranks([make_rank(make_run(0))])
    shown = trace._repr_html_()
    assert re.match(r"<iframe sandbox srcdoc=", shown)
    assert " src=" not in shown
    (escaped,) = re.findall(r'srcdoc="([^"]*)"', shown)
    page = html.unescape(escaped)
    assert page == to_page(trace)
    assert "<script" not in page
    verdict = str(trace).splitlines()[-1]
    assert f'title="{html.escape(verdict)}"' in shown
    assert "pmean/grads" in str(trace)
