"""A rank that dies of a signal, as of a corrupted heap."""

import os


def give_up() -> None:
    os.abort()


if __name__ == "__main__":
    give_up()
