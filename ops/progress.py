"""tqdm's bar, where somebody wants to see one."""


def progress(total: int | None, verbose: bool, unit: str):
    """A progress bar; a silent one unless `verbose`."""
    if not verbose:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("verbose=True needs tqdm: pip install tqdm") from None
    return tqdm(total=total, unit=unit, dynamic_ncols=True)


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        pass

    def set_description(self, _):
        pass
