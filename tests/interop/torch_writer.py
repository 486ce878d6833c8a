"""Writes files in PyTorch's formats, good ones and bad ones, without PyTorch."""

import collections
import io
import pickle
import zipfile


class Call:
    """Pickled as: import ``name``, call it with ``arguments``; then the state, if there is one."""

    def __init__(self, name, *arguments, state=None, make=None):
        self.name, self.arguments, self.state = name, arguments, state
        self.make = make or (pickle.REDUCE if state is None else pickle.NEWOBJ)


class Name:
    """Pickled as: import ``name``."""

    def __init__(self, name):
        self.name = name


class Storage:
    """Pickled as a persistent id; its bytes become a member of the archive."""

    def __init__(self, kind, array, key):
        self.kind, self.array, self.key = kind, array, key


def tensor(kind, array, key="0", shape=None, strides=None, offset=0):
    """A tensor that views a storage with the elements of ``array``."""
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(s // array.itemsize for s in array.strides)
    return Call(
        "torch._utils _rebuild_tensor_v2",
        Storage(kind, array, key),
        offset,
        shape,
        strides,
        False,
        Call("collections OrderedDict"),
    )


class _Pickler(pickle._Pickler):
    """The pickler written in Python, whose stream can be fed with names of absent modules."""

    def __init__(self, stream, more=()):
        super().__init__(stream, protocol=2)
        self.storages, self.more = {}, more

    def persistent_id(self, item):
        if not isinstance(item, Storage):
            return None
        self.storages[item.key] = item.array
        return (
            "storage",
            Name(f"torch {item.kind}"),
            item.key,
            "cuda:0",
            item.array.size,
            *self.more,
        )

    def save(self, item, save_persistent_id=True):
        if isinstance(item, Name):
            module, name = item.name.split(" ")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(item, Call):
            self.save(Name(item.name))
            self.save(item.arguments)
            self.write(item.make)
            if item.state is not None:
                self.save(item.state)
                self.write(pickle.BUILD)
        else:
            super().save(item, save_persistent_id)


def write_old(
    path, content, *, version=1001, little=True, view=None, keys=None, count=None, cut=None
):
    """Saves ``content`` in the format before PyTorch 1.6; the options make a bad file of it."""
    stream = io.BytesIO()
    order = "little" if little else "big"
    for head in (
        0x1950A86A20F9469CFC6C,
        version,
        {"protocol_version": 1001, "little_endian": little},
    ):
        pickle.dump(head, stream, 2)
    pickler = _Pickler(stream, [view])
    pickler.dump(content)
    pickle.dump(list(pickler.storages) if keys is None else keys, stream, 2)
    for array in pickler.storages.values():
        stream.write((array.size if count is None else count).to_bytes(8, order, signed=True))
        stream.write(array.tobytes() if little else array.byteswap().tobytes())
    path.write_bytes(stream.getvalue()[:cut])


def write(path, content, *, byteorder=None, members=(), compression=zipfile.ZIP_STORED):
    """Saves ``content``: containers, numbers, strings, ``Call`` and ``tensor(...)``."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    files = collections.OrderedDict({"archive/data.pkl": stream.getvalue()})
    if byteorder:
        files["archive/byteorder"] = byteorder
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*files.items(), *members]:
            archive.writestr(name, data)
        # One by one, so that a large file takes little memory.
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
