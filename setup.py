"""Maps the repository's folders to the import package `mentorch` (why: CONTRIBUTING.md)."""

from setuptools import find_packages, setup

# The folders engine/ and kernels/ are what people read; their import names are mentorch.engine and
# mentorch.kernels, so that no installation puts a top-level `kernels` (Hugging Face's) on the path.
ROOTS = {"mentorch.engine": "engine", "mentorch.kernels": "kernels"}

packages = ["mentorch"]
for name, folder in ROOTS.items():
    packages += [name] + [f"{name}.{sub}" for sub in find_packages(folder)]

setup(packages=packages, package_dir={"mentorch": "mentorch", **ROOTS})
