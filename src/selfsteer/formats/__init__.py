"""Our records in other programs' formats, the cards that tell how they were made, the hub.

What comes in is read by `selfsteer.data.shapes`. docs/formats.md has the table of what each format
can say; what an export leaves out is counted in `Exported.left_out`.
"""

from selfsteer.formats.export import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
