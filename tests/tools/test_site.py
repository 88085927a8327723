"""The pages that the site is built from, and what a built page must not do; building it is `make docs`."""

import json
import tomllib

import pytest

from tools.site import check, stage
from tools.site.__main__ import SETTINGS, entries


@pytest.fixture
def repository(tmp_path):
    """A page with a link of each kind."""
    files = {
        "README.md": "# Top\n",
        "CHANGELOG.md": "# Changes\n",
        "docs/page.md": "# Page\n",
        "docs/images/a.png": "png",
        "examples/README.md": "[one](one.py)\n",
        "examples/one.py": "print('```')\n",
        "agents/__init__.py": "",
        "agents/policy.py": "",
        "docs/results/one.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def staged(repository, text):
    (repository / "docs" / "page.md").write_text(text)
    stage.stage(repository / "out", repository, ["docs/*.md"])
    return (repository / "out" / "page.md").read_text()


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("page.md#there", "page.md#there"),
        ("#there", "#there"),
        ("https://example.org/a.md", "https://example.org/a.md"),
        ("../README.md", "index.md"),
        ("../CHANGELOG.md", "changelog.md"),
        ("images/a.png", "images/a.png"),
        ("../examples/README.md#x", "examples.md#x"),
        ("../examples/one.py", "source/examples/one.py.md"),
        ("../agents/policy.py", "reference/diffusion_gym.agents.policy.md"),
        ("../agents", "reference/diffusion_gym.agents.md"),
        ("results", "source/docs/results/index.md"),
    ],
)
def test_every_link_leads_to_a_page_of_the_site(repository, link, becomes):
    assert staged(repository, f"see [`it`]({link}), ![]({link})\n") == f"see [`it`]({becomes}), ![]({becomes})\n"
    if not becomes.startswith(("http", "#", "index")):
        assert (repository / "out" / becomes.split("#")[0]).is_file()


def test_what_a_linked_page_links_to_follows(repository):
    staged(repository, "[examples](../examples/README.md)\n")
    assert (repository / "out" / "examples.md").read_text() == "[one](source/examples/one.py.md)\n"
    assert "````python\nprint('```')\n" in (repository / "out" / "source" / "examples" / "one.py.md").read_text()


def test_a_link_that_leads_nowhere_is_refused(repository):
    with pytest.raises(ValueError, match=r"docs/page\.md links to 'other\.md#there', which is not there; mend"):
        staged(repository, "[x](other.md#there)\n")
    (repository.parent / "outside.md").touch()
    with pytest.raises(ValueError, match="which is not there"):
        staged(repository, "[x](../../outside.md)\n")


def test_code_stays_as_it_is(repository):
    text = "`[a](b.md)` and ``[c](`d`)``\n\n```python\nx = [f](y)\n- no list\n```\n"
    assert staged(repository, text) == text


def test_lists_begin_after_an_empty_line_and_markers_go(repository):
    text = "words\n- one\n  more\n- two\nend\n<!-- costs -->\n| a |\n<!-- /costs -->\n"
    assert staged(repository, text) == "words\n\n- one\n  more\n- two\nend\n\n| a |\n\n"


def test_the_navigation_has_every_page_in_at_most_seven_sections(tmp_path):
    nav = tomllib.loads(SETTINGS.read_text())["project"]["nav"]
    listed = list(entries(nav))
    assert len(nav) <= 7 and len(listed) == len(set(listed))
    pages = {str(page) for page in stage.stage(tmp_path)}
    assert pages <= set(listed)
    modules = {page for page in listed if page.startswith("reference/")}
    missing = [page for page in set(listed) - pages - modules if not (tmp_path / page).is_file()]
    assert not missing
    for page in modules:
        inner = page.removeprefix("reference/").removesuffix(".md").replace(".", "/")
        assert (stage.ROOT / f"{inner}.py").is_file() or (stage.ROOT / inner / "__init__.py").is_file(), page


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ('<img src="https://example.org/a.png">', "loads https://example.org/a.png, which is elsewhere"),
        ('<script src="//example.org/a.js"></script>', "which is elsewhere"),
        ('<link rel="stylesheet" href="https://fonts.example.org/css">', "which is elsewhere"),
        ('<img src="missing.png">', "loads missing.png, which is not there"),
        ('<pre class="mermaid"></pre>', "has a .mermaid, for which the theme loads a script from elsewhere"),
        ('<img src="heavy.png">', "weighs 1,000,"),
    ],
)
def test_a_page_that_fetches_what_it_must_not_is_found(tmp_path, element, said):
    (tmp_path / "heavy.png").write_bytes(bytes(check.LIMIT))
    (tmp_path / "page.html").write_text(f"<p>{element}</p>")
    (problem,) = check.problems(tmp_path)
    assert problem.startswith("page.html ") and said in problem


def test_links_that_a_reader_follows_may_lead_elsewhere(tmp_path):
    (tmp_path / "small.png").touch()
    (tmp_path / "page.html").write_text(
        '<link rel="canonical" href="https://example.org/"><a href="https://example.org">x</a>'
        '<img src="small.png"><img src="/small.png"><img src="data:image/png;base64,">'
    )
    assert check.problems(tmp_path) == []


@pytest.mark.parametrize("rule", ["a { background: url('https://e.org/a.png') }", "@import '//e.org/a.png';"])
def test_a_style_that_fetches_from_elsewhere_is_found(tmp_path, rule):
    (tmp_path / "own.css").write_text("a { background: url(a.png) } b { background: url(data:image/png;base64,) }")
    (tmp_path / "theirs.css").write_text(rule)
    (problem,) = check.problems(tmp_path)
    assert problem.startswith("theirs.css loads ") and "e.org/a.png, which is elsewhere" in problem


@pytest.fixture
def searched(tmp_path):
    """A built site whose search finds what it must; what it returns writes its index."""

    def write(**changed):
        entry = {"location": "index.html#a", "title": "Words", "text": ", ".join(check._SOUGHT)}
        (tmp_path / "search.json").write_text(json.dumps({"items": [{**entry, **changed}]}))

    (tmp_path / "index.html").write_text('{"search":"./worker.js"}')
    (tmp_path / "worker.js").touch()
    write()
    return write


def test_a_search_that_finds_what_is_sought_has_no_problem(searched, tmp_path):
    assert check.search_problems(tmp_path) == []


def test_a_search_that_would_not_work_is_found(searched, tmp_path):
    searched(text="clip range, guidance scale, KL, eta, Stable-Baselines3")
    assert check.search_problems(tmp_path) == ["search.json has no entry with 'reward queries'"]
    searched(location="gone.html#a")
    assert check.search_problems(tmp_path) == ["search.json leads to gone.html, which is not there"]
    searched(text=f"clip range, guidance scale, reward queries, KL, eta, Stable-Baselines3 {'x' * check.LIMIT}")
    (problem,) = check.search_problems(tmp_path)
    assert "leave pages out of the search" in problem
    (tmp_path / "search.json").unlink()
    assert check.search_problems(tmp_path) == ["search.json is not there; it needs project.plugins.search"]
    (tmp_path / "worker.js").unlink()
    (problem,) = check.search_problems(tmp_path)
    assert "no worker of the search" in problem
