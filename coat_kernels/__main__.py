"""`python -m coat_kernels`: which backend serves which op on this machine."""

from . import __version__, backends


def main() -> None:
    table = backends()
    print(f"coat_kernels {__version__}")
    for op, row in table.items():
        for device, backend in row.items():
            print(f"  {op:<12} {device:<10} {backend}")


if __name__ == "__main__":
    main()
