"""Class names and record layouts of the published sets."""

from __future__ import annotations

from dataclasses import dataclass

DIGITS = tuple(map(str, range(10)))

FASHION = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class CifarLayout:
    """What differs between CIFAR-10 and CIFAR-100.

    Attributes:
        stem: what its folders and archives are called: STEM-binary.tar.gz, STEM-python.tar.gz.
        train: regular expression of the names of the training files, without ".bin".
        test: name of the test file, without ".bin".
        labels: label bytes of a binary record; the last one is the class.
        key: where the Python version keeps the classes.
        names: the classes.
        example: the training files in words.
    """

    stem: str
    train: str
    test: str
    labels: int
    key: str
    names: tuple[str, ...]
    example: str


CIFAR10 = CifarLayout(
    "cifar-10",
    r"data_batch_\d+",
    "test_batch",
    1,
    "labels",
    tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "data_batch_*",
)

CIFAR100 = CifarLayout(
    "cifar-100",
    "train",
    "test",
    2,
    "fine_labels",
    tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
        couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
        house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
        rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
        sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
        turtle wardrobe whale willow_tree wolf woman worm
        """.split()
    ),
    "train",
)
