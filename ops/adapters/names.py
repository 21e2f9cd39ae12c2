"""Names of modules in a file beside those in a model that may be wrapped, or be a part of the one it was saved from."""
from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # of modules inside a model


def canonical(name: str) -> str:
    """The name without what torch's wrappers put between."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def places(keys: Iterable[str], modules: Iterable[str]) -> tuple[dict[str, str], str]:
    """{key: the module that it means}, without those that mean none, and for these a hint in an error message.

    A key means the module of its name; or, where all keys fit in one way only, of its name under one prefix more or
    fewer.
    """
    keys, names = list(keys), {canonical(n): n for n in modules}
    plain = {k: names[canonical(k)] for k in keys if canonical(k) in names}
    if len(plain) == len(keys):
        return plain, ""
    ways = {way: _moved(keys, names, *way) for way in _ways(keys, names)}
    most = max(map(len, ways.values()), default=0)
    ways = {tuple(at.items()): (*way, at) for way, at in reversed(ways.items()) if len(at) == most}
    if most == len(keys) and len(ways) == 1:
        return next(iter(ways.values()))[2], ""
    if most <= len(plain):
        return plain, ""
    cut, before, _ = list(ways.values())[-1]
    how = " and ".join([f"without {cut!r}"] * bool(cut) + [f"under {before!r}"] * bool(before))
    more = f", as in {len(ways) - 1} other ways" if len(ways) > 1 else ""
    return plain, f" ({how} {most} of the file's {len(keys)} modules would fit{more})"


def _ways(keys, names) -> list[tuple[str, str]]:
    """(what to cut off, what to put before) that give the first or the last key a module."""
    found, inner = {}, [k for k in map(canonical, keys) if k]
    if not inner:  # the model's own parameters
        return [("", f"{n}.") for n in names if n]
    for key in inner[:1] + inner[-1:]:
        parts = key.split(".")
        for cut in ("".join(p + "." for p in parts[:i]) for i in range(len(parts))):
            tail = key.removeprefix(cut)
            found |= {(cut, n.removesuffix(tail)): None for n in names if f".{n}".endswith(f".{tail}")}
    return [way for way in found if any(way)]


def _moved(keys, names, cut, before) -> dict[str, str]:
    at = {k: names.get((before + canonical(k).removeprefix(cut)).rstrip("."))
          for k in keys if canonical(k).startswith(cut)}
    return {k: n for k, n in at.items() if n is not None}
