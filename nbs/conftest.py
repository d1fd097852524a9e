"""What the tests say about notebooks beside nbval's own report: how much was checked, and where each notebook first failed."""
import pytest

from course_lib.run import checks

ran: list = []                                      # reports of the cells that ran, on the process that prints


def pytest_collection_modifyitems(items: list) -> None:
    for item in items:
        if hasattr(item, "cell"):
            item.user_properties += [("compared", bool(item.options["check"])), ("checks", checks("".join(item.cell.source)))]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and "compared" in dict(report.user_properties):
        ran.append(report)


def pytest_terminal_summary(terminalreporter) -> None:
    if not ran:
        return
    passed = [dict(r.user_properties) for r in ran if r.passed]
    first: dict[str, str] = {}
    for r in ran:
        if r.failed:
            name, cell = r.nodeid.split("::", 1)
            first.setdefault(name, cell)
    terminalreporter.section("notebooks")
    for name, cell in first.items():
        terminalreporter.write_line(f"{name}: {cell} failed first; later failures may only follow from it", red=True)
    terminalreporter.write_line(f"{len({r.nodeid.split('::')[0] for r in ran})} notebooks, {len(passed)} cells ran, "
                                f"{sum(p['compared'] for p in passed)} compared with their stored output, "
                                f"{sum(p['checks'] for p in passed)} assertions held")
