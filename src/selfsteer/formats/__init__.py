"""Triples from other people's files, and our records in other programs' formats.

The authors' release (icip-cas/SSO) writes a triple as one flat record, an Alpaca record grown by
the two system messages and the plain response::

    {"instruction": "What does the bee eat?", "history": [], "system": "",
     "p_system": "Your response should be accurate. …", "n_system": "Your response should be …",
     "chosen": "The bee eats nectar.", "rejected": "The bee eats bricks.", "raw": "Okay. …"}

``shapes`` knows single records, ``files`` rows, ``reading`` and ``writing`` whole files, ``cards``
the README of a data set or a model, ``hub`` the way out. docs/formats.md has the table of what each
shape can say; what an export leaves out is counted in `Exported.left_out`, what an import drops in
`Imported.dropped`.
"""

from selfsteer.data.reading import Imported, import_records, read_triples
from selfsteer.formats.export import FORMATS, Exported, export, export_parquet, export_triples

__all__ = [
    "FORMATS",
    "Exported",
    "Imported",
    "export",
    "export_parquet",
    "export_triples",
    "import_records",
    "read_triples",
]
