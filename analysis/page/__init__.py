"""The report as one HTML file: tables to sort, figures to point at, and every run behind a number.

    tables, cells, runs, curves --page--> str

It opens from disk without a network: the plotting library, styles and scripts are inside, and its content security
policy forbids every request and every other script. Names, settings, errors and logs are text that anybody may have
written: `document.py` escapes them into HTML, `data.py` into JSON, and the scripts show them as text. The same input
gives the same bytes.
"""

from analysis.page.document import PageTable, page

__all__ = ["PageTable", "page"]
