"""Small sets written in the formats the real ones are distributed in, independent of the readers."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np

DIGIT_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def arrays(train=23, test=11, shape=(3, 32, 32), classes=10, seed=0):
    """train_x, train_y, test_x, test_y; every class occurs among the first labels."""
    random = np.random.default_rng(seed)
    out = []
    for count in (train, test):
        out.append(random.integers(0, 256, (count, *shape), dtype=np.uint8))
        out.append((np.arange(count) * 7 + seed) % classes)
    return out


def idx_bytes(array):
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder, data, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    train_x, train_y, test_x, test_y = data
    for stem, array in zip(DIGIT_STEMS, (train_x[:, 0], train_y, test_x[:, 0], test_y), strict=True):
        content = idx_bytes(array)
        path = folder / (stem + ".gz" if zipped else stem)
        path.write_bytes(gzip.compress(content, 1) if zipped else content)


def cifar_records(images, labels, coarse=False):
    parts = []
    for image, label in zip(images, labels, strict=True):
        parts.append(bytes((label // 5, label) if coarse else (label,)) + image.tobytes())
    return b"".join(parts)


def python2_string(value):
    return b"T" + struct.pack("<I", len(value)) + value  # BINSTRING: bytes that Python 2 called str


def python2_pickle(data, labels, key):
    """{'data': array, key: [labels]} as Python 2 and numpy 1 wrote it, opcode by opcode (protocol 2)."""
    integer = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\n" + python2_string(b"u1") + integer(0) + integer(1) + b"\x87R"
        b"(" + integer(3) + python2_string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85"
        + python2_string(b"b") + b"\x87R"
        + b"(" + integer(1) + integer(data.shape[0]) + integer(data.shape[1]) + b"\x86" + dtype
        + b"\x89" + python2_string(data.tobytes()) + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(integer(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + python2_string(b"data") + array + python2_string(key) + listed + b"u."


def python3_pickle(protocol):
    def dump(data, labels, key):
        return pickle.dumps({b"data": data, key: [int(label) for label in labels]}, protocol)

    return dump


def write_cifar_binary(folder, data, coarse=False):
    """Two training batches for CIFAR-10, the one training file for CIFAR-100."""
    folder.mkdir(parents=True, exist_ok=True)
    train_x, train_y, test_x, test_y = data
    if coarse:
        (folder / "train.bin").write_bytes(cifar_records(train_x, train_y, True))
        (folder / "test.bin").write_bytes(cifar_records(test_x, test_y, True))
        return
    half = len(train_x) // 2
    (folder / "data_batch_1.bin").write_bytes(cifar_records(train_x[:half], train_y[:half]))
    (folder / "data_batch_2.bin").write_bytes(cifar_records(train_x[half:], train_y[half:]))
    (folder / "test_batch.bin").write_bytes(cifar_records(test_x, test_y))
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")


def write_cifar_python(folder, data, coarse=False, dump=python2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    train_x, train_y, test_x, test_y = data
    half = len(train_x) // 2
    key = b"fine_labels" if coarse else b"labels"
    parts = {
        "data_batch_1": (train_x[:half], train_y[:half]),
        "data_batch_2": (train_x[half:], train_y[half:]),
        "test_batch": (test_x, test_y),
    }
    if coarse:
        parts = {"train": (train_x, train_y), "test": (test_x, test_y)}
    for name, (x, y) in parts.items():
        (folder / name).write_bytes(dump(x.reshape(len(x), -1), y, key))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane"]}))


def archive(folder, path):
    """FOLDER as a .tar.gz with its name as the top folder, as the published archives are."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=folder.name)


def write_svhn(folder, data, extra=None):
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": data[:2], "test": data[2:]} | ({"extra": extra} if extra is not None else {})
    for name, (x, y) in parts.items():
        content = {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]}
        savemat(folder / f"{name}_32x32.mat", content, do_compression=True)


def write_npz(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), data, strict=True)))


def png(colour, size=(12, 8), mode="RGB", kind="PNG"):
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def write_imagefolder(folder, held_out="val"):
    """Two classes of plain colours: 3 and 2 training images, 1 and 1 held out."""
    for part, counts in (("train", (3, 2)), (held_out, (1, 1))):
        for (name, colour), count in zip(
            {"ants": (255, 0, 0), "bees": (0, 0, 255)}.items(), counts, strict=True
        ):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.png").write_bytes(png(colour))
