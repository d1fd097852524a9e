"""Packaging from settings.ini, the one place for the package's metadata and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lab, scale = cfg["lab_requirements"].split(), cfg["scale_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=["course_lib"],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"lab": lab, "scale": scale, "dev": lab + scale + cfg["dev_requirements"].split(),
                    "bench": cfg["bench_requirements"].split(), "docs": cfg["docs_requirements"].split()},
)
