"""A hook of mkdocs: pages and images of the site that lie elsewhere in the repository.

In: the files that mkdocs found in docs/, and the text of each page. Out: the same with `OUTSIDE` added, and links to
these turned into links of the site, so that one link is right both in the repository and on the site.
"""

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = {  # path in the repository -> path on the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/GPU_RUN.md": "gpu-run.md",
    "bench/results/nano.png": "images/nano.png",
    "flux_jax/nano/data/nano-bf16/sheet.png": "images/sheet.png",
}
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    inside = {uri: path for path, uri in OUTSIDE.items()}
    source = inside.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = source.rpartition("/")[0]

    def on_the_site(link: re.Match[str]) -> str:
        path = normpath(f"{folder}/{link[1]}" if folder else link[1])
        return OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else link[1])

    return LINK.sub(on_the_site, markdown)
