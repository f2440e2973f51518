"""Lists what there is to pack: one record per sample, from a folder, a zip, a CSV or a JSONL file.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg   files.py ─┐   names.py: labels, categories
    zip     구이.zip in kfood.zip, read in place    zips.py  ─┼─► scan.py ──► records sorted by `source`
    CSV     image_path,label                        table.py ─┤   boxes.py: where the dish is
    JSONL   {"image", "question", "answer"}         jsonl.py ─┘   rows.py: what a list says
                                                                                  │
                              bytes of one picture ◄── read.py ◄── opened.py ◄────┘  in any process

Names are compared in NFC, whatever form the file system or the zip has (macOS writes NFD). Files are opened by their
real path, members of zips by their position. Only listings and sizes are read here, no picture. Nothing is ever
unpacked to disk. cells.py reads the rows of a CSV, and spelling.py finds the files that its paths mean.
"""

from kfood_dist.pack.sources.boxes import BoxCount
from kfood_dist.pack.sources.read import read_picture
from kfood_dist.pack.sources.record import Record
from kfood_dist.pack.sources.scan import Scan, scan, scan_source

__all__ = ["BoxCount", "Record", "Scan", "read_picture", "scan", "scan_source"]
