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
    keys, names = list(keys), {canonical(n): n for n in modules if n}
    plain = {k: names[canonical(k)] for k in keys if canonical(k) in names}
    if len(plain) == len(keys):
        return plain, ""
    ways = {(cut, before): at for cut in _cuts(keys) for before in ("", *(n + "." for n in names)) if cut or before
            if (at := _moved(keys, names, cut, before))}
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


def _cuts(keys) -> list[str]:
    """Leading parts of the keys that might be a wrapper's."""
    parts = [canonical(k).split(".") for k in keys]
    return ["", *dict.fromkeys(".".join(p[:i]) + "." for p in parts[:1] + parts[-1:] for i in range(1, len(p)))]


def _moved(keys, names, cut, before) -> dict[str, str]:
    at = {k: names.get(before + canonical(k).removeprefix(cut)) for k in keys if canonical(k).startswith(cut)}
    return {k: n for k, n in at.items() if n is not None}
