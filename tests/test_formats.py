"""Data sets on disk of data.py against tarfile, files made by hand and hostile ones.

    python -m pytest tests/test_formats.py
"""
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tarfile
import tracemalloc
from functools import partial

import numpy as np
import PIL.Image
import pytest

import data
from conftest import SHARED, needs_shared, on_processes
from data import BadRecord, Mixed, Shards, UserError, expand_braces, hash_names, open_data

PAIRS = SHARED / "pairs"


def jpeg(gray: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("L", size, gray).save(out, "JPEG")
    return out.getvalue()


def make_tar(path, members: list, format: int = tarfile.PAX_FORMAT, **info):
    """members: (name, bytes), or a TarInfo for what is no regular file."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(special(member[0], tarfile.REGTYPE, size=len(member[1]), **info), io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, **more) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for key, value in more.items():
        setattr(entry, key, value)
    return entry


def pairs(n: int, first: int = 0) -> list:
    """n images, picture k of gray value k, with caption "picture k"."""
    return [item for k in range(first, first + n)
            for item in ((f"{k:09d}.jpg", jpeg(k)), (f"{k:09d}.txt", f"picture {k}".encode()))]


def captions(dataset) -> list[tuple[str, ...]]:
    return [dataset.read(i).captions for i in range(len(dataset))]


def names(dataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def gray(sample) -> int:
    return round(np.asarray(data.decode(sample.image)).mean())


def grays(dataset) -> list[int]:
    return [gray(dataset.read(i)) for i in range(len(dataset))]


def refused(message: str, function, *arguments) -> str:
    """What a UserError, or BadRecord, says in one line, `message` among it."""
    with pytest.raises((UserError, BadRecord)) as error:
        function(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ---- shards ---------------------------------------------------------------------------------------------------------

def test_braces():
    for pattern, want in {"a.tar": "a.tar", "{0..2}.tar": "0.tar 1.tar 2.tar", "{00..02}.tar": "00.tar 01.tar 02.tar",
                          "{8..10}": "8 9 10", "{08..10}": "08 09 10", "{098..100}": "098 099 100", "{5..5}": "5",
                          "{0..1}": "0 1"}.items():              # a single 0 does not ask for padding
        assert expand_braces(pattern) == want.split()
    for pattern in ("{0..2", "0..2}", "{a}", "{}", "{3..1}", "{a..c}", "{0..}", "{{0..2},7}", "{0..9999999999}",
                    "{0..4..2}", "}{", "{a,b}", "{0..1}{0..1}"):
        refused(f"cannot read shards:{pattern}", expand_braces, pattern)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header(tmp_path, format):
    long = ["n" * length for length in (96, 97, 150, 255, 5000)]
    long += ["folder/" * 16 + "ü", "z/" * 60 + "w" * 30, "a=b\nc"]
    members = [member for name in long for member in ((f"{name}.jpg", jpeg()), (f"{name}.txt", b"x"))]
    shards = Shards(str(make_tar(tmp_path / "t.tar", members, format, mtime=1700000000.5, uname="ü", uid=3_000_000)))
    assert names(shards) == [f"t/{name}" for name in long] and captions(shards) == [("x",)] * len(long)


@pytest.mark.slow
@needs_shared
def test_real_shards_are_those_of_tarfile():
    shards = Shards(f"{PAIRS}/{{00000..00002}}.tar")
    assert len(shards) == 2855 and shards.notes == [] and shards.classes is None
    assert hash_names(shards) == "58bc22acd40ad8b02e64519bb2f409b0f5403c2fc459e497bcf5cc9296ab52d3", "never changes"
    with tarfile.open(PAIRS / "00001.tar") as tar:
        for i in range(1000, 2000, 37):
            stem, key = shards.name(i).split("/")
            record, sample = json.load(tar.extractfile(f"{key}.json")), shards.read(i)
            assert stem == "00001" and sample.captions == (record["caption"].strip(),)
            assert sample.image.size == (record["width"], record["height"])


def test_pairs_in_every_order_and_from_either_caption_file(tmp_path):
    caption = json.dumps({"caption": "from json", "url": "x"}).encode()
    shards = Shards(str(make_tar(tmp_path / "s.tar", [
        special("b/", tarfile.DIRTYPE), ("b/1.txt", b"  apart \n"), ("2.JPG", jpeg(2)), ("3.json", caption),
        ("4.jpeg", jpeg(4)), ("4.json", caption), ("3.png", jpeg(3)), ("2.txt", "\ufeffÄ cat".encode()),
        ("4.txt", b"text wins"), ("b/1.webp", jpeg(1)), ("my.photo.jpg", jpeg(5)), ("my.photo.txt", b"dots"),
        ("./6.jpg", jpeg(6)), ("6.txt", b"dot slash"), ("7.jpg", jpeg(7)), ("7.txt", b"word " * 200_000),
        ("2.cls", b"7"), ("._2.jpg", b"left by a Mac"), ("README", b"?")])))
    assert dict(zip(names(shards), zip(grays(shards), captions(shards)))) == {
        "s/b/1": (1, ("apart",)), "s/2": (2, ("Ä cat",)), "s/3": (3, ("from json",)), "s/4": (4, ("text wins",)),
        "s/my.photo": (5, ("dots",)), "s/6": (6, ("dot slash",)), "s/7": (7, (("word " * 200_000).strip(),))}
    assert shards.notes == ["1 hidden files (.NAME, __MACOSX), not read"]


def test_what_is_left_out_is_counted(tmp_path):
    make_tar(tmp_path / "0.tar", [("1.jpg", jpeg()), ("2.txt", b"x"), ("3.txt", b"x"), *pairs(1), *pairs(1, 7),
                                  ("000000007.txt", b"again"), ("4.json", b"{}")])
    make_tar(tmp_path / "1.tar", [])
    make_tar(tmp_path / "2.tar", pairs(2))
    shards = Shards(str(tmp_path / "{0..2}.tar"))
    assert names(shards) == ["0/000000000", "0/000000007", "2/000000000", "2/000000001"]
    assert captions(shards)[1] == ("again",), "of two members of one name tar leaves the last"
    assert sorted(shards.notes) == sorted([
        "1 images without a caption", "3 captions without an image", "1 members repeat a name, the last one is read",
        "1 of 3 shards hold no pair"])


@pytest.mark.parametrize("hostile", [
    special("9.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
    special("9.txt", tarfile.SYMTYPE, linkname="/etc/passwd"),
    special("9.txt", tarfile.LNKTYPE, linkname="000000000.txt"),
    special("9.txt", tarfile.FIFOTYPE),
    special("9.txt", tarfile.CHRTYPE, devmajor=1, devminor=5),
    special("9.txt", tarfile.BLKTYPE, devmajor=8),
    special("9.txt", tarfile.GNUTYPE_SPARSE),
    special("9.txt", b"Z"),                                        # no kind that anybody knows
    special("9.txt", tarfile.REGTYPE, pax_headers={"GNU.sparse.size": "0"}),
    ("/etc/passwd.txt", b"x"),
    ("../9.txt", b"x"),
    ("a/../../9.jpg", b"x"),
])
def test_what_is_no_plain_file_is_never_read(tmp_path, hostile):
    shards = Shards(str(make_tar(tmp_path / "s.tar", [hostile, ("9.jpg", jpeg(9)), *pairs(2)])))
    assert captions(shards) == [("picture 0",), ("picture 1",)]
    assert "1 links, devices, sparse files or paths that leave the folder, not read" in shards.notes


def with_header(tar: bytes, at: int, **fields: tuple[int, bytes]) -> bytes:
    """The tar with fields of the header at byte `at` overwritten, each (place, bytes), and its checksum put right."""
    header = bytearray(tar[at:at + 512])
    for place, value in fields.values():
        header[place:place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + 512:]


def header_of(tar: bytes, member: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return file.getmembers()[member].offset


@pytest.mark.parametrize("damage, note", [
    (lambda tar, at: tar[:at + 100], "cut short at byte"),                            # cut in a header
    (lambda tar, at: tar[:at], "cut short"),                                          # cut between two members
    (lambda tar, at: tar[:at + 512 + 50], "cut short: has"),                          # cut in an image
    (lambda tar, at: tar[:at + 9] + b"?" + tar[at + 10:], "damaged"),                 # the checksum is wrong
    (lambda tar, at: tar[:at] + bytes(range(256)) * 2 + tar[at + 512:], "damaged"),   # overwritten
    (lambda tar, at: with_header(tar, at, size=(124, b"77777777777\0")), "cut short: has"),         # claims 8 GiB
    (lambda tar, at: with_header(tar, at, size=(124, b"\x80" + b"\x7f" * 11)), "cut short: has"),   # claims 2 ** 87
    (lambda tar, at: with_header(tar, at, size=(124, b"\xff" * 12)), "cut short: has"),             # claims -1
    (lambda tar, at: with_header(tar, at, size=(124, b"-0000000600\0")), "cut short: has"),
    (lambda tar, at: tar[:at] + b"\0" * (2 << 20) + tar[at:], "damaged or cut short at byte"),    # zeros in the middle
])
def test_records_before_the_damage_are_used(tmp_path, damage, note):
    tar = make_tar(tmp_path / "s.tar", pairs(4)).read_bytes()
    (tmp_path / "s.tar").write_bytes(damage(tar, header_of(tar, 4)))
    for _ in range(2):                                   # the second time from the cache
        shards = Shards(str(tmp_path / "s.tar"), tmp_path / "cache")
        assert captions(shards) == [("picture 0",), ("picture 1",)]
        assert len(shards.notes) == 1 and shards.notes[0].startswith(f"{tmp_path}/s.tar: ") and note in shards.notes[0]


def test_ten_damaged_shards_are_named_and_the_others_counted(tmp_path):
    tar = make_tar(tmp_path / "s.tar", pairs(2)).read_bytes()
    for k in range(13):
        (tmp_path / f"{k:02}.tar").write_bytes(tar[:header_of(tar, 2)])
    notes = Shards(f"{tmp_path}/{{00..12}}.tar").notes
    assert len(notes) == 11 and notes[-1] == "3 more shards are damaged or cut short"


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"garbage" * 1000, b"<html>"])
def test_a_shard_without_pairs(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    refused("no image with a caption", Shards, str(tmp_path / "0.tar"))
    make_tar(tmp_path / "1.tar", pairs(1))
    shards = Shards(str(tmp_path / "{0..1}.tar"))
    assert captions(shards) == [("picture 0",)] and "1 of 2 shards hold no pair" in shards.notes


@pytest.mark.slow
def test_any_damage_to_a_shard_ends_in_pairs_or_one_line(tmp_path):
    long = "n" * 150
    tar = make_tar(tmp_path / "s.tar", [*pairs(2), (long + ".jpg", jpeg()), (long + ".txt", b"x")]).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(tar)
        for _ in range(rng.integers(1, 8)):
            broken[rng.integers(tar.rindex(b"x"))] = rng.integers(256)
        (tmp_path / "s.tar").write_bytes(broken[:rng.integers(1, len(broken))] if rng.random() < 0.3 else broken)
        try:
            grays(Shards(str(tmp_path / "s.tar")))
        except (UserError, BadRecord):
            pass


@pytest.mark.parametrize("name, content, message", [
    ("1.txt", b"\xff\xfe caption", "caption is not UTF-8"),
    ("1.txt", b"cut \xe2\x82", "caption is not UTF-8"),
    ("1.txt", b"", "empty caption"),
    ("1.txt", " \u00a0\n\t".encode(), "empty caption"),
    ("1.json", b'{"caption": "half a pair \\ud83d"}', "caption is not UTF-8"),
    ("1.json", b'{"caption": ""}', "empty caption"),
    ("1.json", b'{"caption": null}', "no caption"),
    ("1.json", b'{"caption": ["a", 5]}', "no caption"),
    ("1.json", b'{"caption": []}', "no caption"),
    ("1.json", b'{"caption": ["", " "]}', "empty caption"),
    ("1.json", b'["caption"]', "no caption"),
    ("1.json", b'{"caption": "x"', "corrupt json"),
    ("1.json", b"[" * 100_000, "corrupt json"),
    ("1.json", b'\xff{"caption": "x"}', "corrupt json"),
])
def test_bad_captions(tmp_path, name, content, message):
    shards = Shards(str(make_tar(tmp_path / "s.tar", [("1.jpg", jpeg()), (name, content)])))
    assert refused(message, shards.read, 0).startswith(message)


def test_missing_shards_are_named(tmp_path):
    for k in (0, 1, 3):
        make_tar(tmp_path / f"{k:05d}.tar", pairs(1))
    for pattern in (tmp_path / "*.tar", tmp_path):
        refused("a range in braces", Shards, str(pattern))
    want = f"2 of 5 shards are missing, the first is {tmp_path}/00002.tar"
    assert refused(want, Shards, str(tmp_path / "{00000..00004}.tar")) == want


def test_a_shard_that_shrinks_after_indexing_gives_bad_records(tmp_path):
    path = make_tar(tmp_path / "s.tar", pairs(3))
    shards = Shards(str(path))
    os.truncate(path, 2000)
    assert shards.read(0).captions == ("picture 0",)
    refused("unreadable shard", shards.read, 2)


def test_the_cache_of_indices(tmp_path, monkeypatch):
    cache, path, walks = tmp_path / "cache", make_tar(tmp_path / "s.tar", pairs(3)), []
    index_tar = data.index_tar
    monkeypatch.setattr(data, "index_tar", lambda path: walks.append(path) or index_tar(path))

    def names_after(walked: int) -> list[str]:
        walks.clear()
        shards = Shards(str(path), cache)
        assert len(walks) == walked
        assert captions(shards) == [(f"picture {int(name[2:])}",) for name in names(shards)]
        return names(shards)

    first = names_after(walked=1)
    assert names_after(walked=0) == first
    [file] = cache.iterdir()                             # one file, nothing temporary beside it
    for damaged in (b"", b"garbage", b"[5]", file.read_bytes()[:300], file.read_bytes()[:-100]):
        file.write_bytes(damaged)
        assert names_after(walked=1) == first
        assert names_after(walked=0) == first
    make_tar(tmp_path / "new.tar", pairs(5, first=2))    # another tar in the same place
    os.replace(tmp_path / "new.tar", path)
    assert len(names_after(walked=1)) == 5
    make_tar(path, pairs(5, first=3))                    # of the same size, but newer
    os.utime(path, ns=(1, 1))
    assert names_after(walked=1)[0] == "s/000000003"
    assert len(list(cache.iterdir())) == 1
    want = hash_names(Shards(str(path), cache))
    [kept] = cache.glob("*.names")
    for damaged in (b"", kept.read_bytes()[:9], want.encode()):      # a power cut may leave an empty file
        kept.write_bytes(damaged)
        assert hash_names(Shards(str(path), cache)) == want == kept.read_text()
    shards = Shards(str(path), path / "cache")           # where no folder can be made
    assert len(shards) == 5 and "not stored" in shards.notes[0]


def test_many_shards_are_held_open_but_no_more_than_may_be(tmp_path):
    for k in range(100):
        make_tar(tmp_path / f"{k:03d}.tar", pairs(1, k))
    shards = Shards(str(tmp_path / "{000..099}.tar"))
    for i in np.random.default_rng(0).permutation(100).tolist() * 2:
        assert shards.read(i).captions == (f"picture {i}",)
    open_files = [os.path.realpath(link) for link in pathlib.Path("/proc/self/fd").glob("*")]       # on Linux
    most = data.open_tar.cache_info().maxsize
    assert sum(file.startswith(os.path.realpath(tmp_path)) for file in open_files) == min(100, most)
    assert most < data.most_open_files()
    size = shards.pairs.nbytes + shards.shard.nbytes + len(shards.keys.blob) + shards.keys.ends.nbytes
    assert size / len(shards) * 15e6 < 1e9, "fifteen million pairs fit in memory"


def walked_here(rank: int, world: int, folder) -> dict:
    walks, index_tar = [], data.index_tar
    data.index_tar = lambda path: walks.append(path) or index_tar(path)
    shards = Shards(f"{folder}/{{0..4}}.tar", folder / "cache")
    return dict(walks=walks, hash=hash_names(shards))


def test_each_process_walks_its_part_of_the_shards(tmp_path):
    for k in range(5):
        make_tar(tmp_path / f"{k}.tar", pairs(2, k))
    found = on_processes(partial(walked_here, folder=tmp_path), 2, tmp_path)
    assert sorted(len(one["walks"]) for one in found) == [2, 3] and len({*found[0]["walks"], *found[1]["walks"]}) == 5
    again = Shards(f"{tmp_path}/{{0..4}}.tar")                                  # no cache: nothing is kept
    assert hash_names(again) == found[0]["hash"] == found[1]["hash"]
    again.hash_file = next((tmp_path / "cache").glob("*.names"))
    again.keys = None
    assert hash_names(again) == found[0]["hash"], "kept beside the indices"


def read_backwards(shards, queue):
    queue.put([shards.read(i).captions[0] for i in reversed(range(len(shards)))])


def test_forked_processes_read_from_the_files_of_their_parent(tmp_path):
    shards = Shards(str(make_tar(tmp_path / "s.tar", pairs(50))))
    shards.read(0)                                       # so that the file is open before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=read_backwards, args=(shards, queue)) for _ in range(3)]
    for child in children:
        child.start()
    mine = [shards.read(i).captions[0] for i in range(50)]
    theirs = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert mine == [f"picture {i}" for i in range(50)] and theirs == [mine[::-1]] * 3


# ---- csv ------------------------------------------------------------------------------------------------------------

def make_csv(folder, text: str | bytes, images: int = 3):
    for k in range(images):
        (folder / f"{k}.jpg").write_bytes(jpeg(k))
    (folder / "table.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"csv:{folder}/table.csv"


@pytest.mark.parametrize("text, want", [
    ("filepath,title\n0.jpg,one\n1.jpg,two\n", ["one", "two"]),
    ("filepath\ttitle\n0.jpg\tone, two; three\n1.jpg\ttwo\n", ["one, two; three", "two"]),        # open_clip's default
    ("filepath;title\n0.jpg;one, two\n", ["one, two"]),
    ("title,url,filepath\none,http://x;y,0.jpg\n", ["one"]),                                  # order and other columns
    ('filepath,title\n0.jpg,"A ""cat"", asleep"\n', ['A "cat", asleep']),
    ('filepath,title\n0.jpg,"two\nlines"\n1.jpg,x\n', ["two\nlines", "x"]),
    ('"filepath","title"\r\n"0.jpg","one"\r\n\r\n"1.jpg","two"\r\n', ["one", "two"]),          # Windows, an empty line
    ("\ufefffilepath,title\n0.jpg,Ä\n", ["Ä"]),                                                 # as Excel saves it
    ("filepath,title\n0.jpg,no end of line", ["no end of line"]),
    ("filepath,title\n0.jpg,a\0b\n", ["a\0b"]),
    ('"filepath", "title"\n"0.jpg", "one"\n', ["one"]),                                          # blanks for the eye
    ("filepath,title,tags\ta;b;c;d\n0.jpg,one,x\n", ["one"]),           # another separator is more frequent
    ("filepath,title\n0.jpg," + "word " * 200_000 + "\n", ["word " * 199_999 + "word"]),
])
def test_csv(tmp_path, text, want):
    table = open_data(make_csv(tmp_path, text))
    assert [caption for [caption] in captions(table)] == want and grays(table) == list(range(len(want)))
    assert table.name(0) == "0.jpg" and table.classes is None


def test_csv_with_other_columns(tmp_path):
    spec = make_csv(tmp_path, "image,caption,title\n0.jpg,right,wrong\n")
    assert captions(open_data(f"{spec},image=image,caption=caption")) == [("right",)]


@pytest.mark.parametrize("row, message", [
    (b"0.jpg", "empty caption"),                           # a row cut short
    (b"0.jpg,", "empty caption"),
    (b"0.jpg,  ", "empty caption"),
    (b"0.jpg,caf\xe9", "caption is not UTF-8"),            # Latin-1
    (b"nowhere.jpg,x", "unreadable file: "),
    (b"a\0b.jpg,x", "unreadable file: "),
    (b",x", "unreadable file: "),
])
def test_bad_rows_of_a_csv(tmp_path, row, message):
    table = open_data(make_csv(tmp_path, b"filepath,title\n" + row + b"\n1.jpg,good\n"))
    assert refused(message, table.read, 0).startswith(message) and table.read(1).captions == ("good",)


@pytest.mark.parametrize("text, message", [
    ("path,title\n0.jpg,x\n", "wanted columns 'filepath' and 'title' in the first line, got 'path,title"),
    ("filepath title\n0.jpg x\n", "got 'filepath title"),
    (b"PAR1" + bytes(range(128, 256)) * 1000, "is a parquet file"),
    ('{"file_name": "0.jpg", "text": "x"}\n', "got '{"),
    ('{"filepath": "0.jpg", "title": "x"}\n{"filepath": "0.jpg", "title": 5}\n', "wanted a text for 'filepath'"),
    ('{"filepath": "0.jpg", "title": "x"}\n{"filepath"\n', "after row 1: JSONDecodeError"),
    (gzip.compress(b"filepath,title\n0.jpg,x\n")[:20], "cannot read"),
    ("", "wanted columns 'filepath'"),
    ("filepath,title\n", "holds no images"),
    ("filepath,title\nx/0.jpg,a\nx/1.jpg,b\n", "none of the first 2 images"),
    ('filepath,title\n0.jpg,x\n1.jpg,"never closed\n' + "2.jpg,filler filler filler\n" * 170_000, "a quote that is"),
])
def test_csv_that_cannot_be_used(tmp_path, text, message):
    line = refused(message, open_data, make_csv(tmp_path, text))
    assert str(tmp_path) in line and len(data.printable(line)) < 400


ROWS = "filepath,title,more\n0.jpg,one,two\n1.jpg,three,\n0.jpg,four,five\n0.jpg,,\n"


@pytest.mark.parametrize("write", [
    str.encode, lambda text: gzip.compress(text.encode()), lambda text: text.encode("utf-16"),
    lambda text: gzip.compress(text.encode("utf-16")), lambda text: text.replace(",", "\t").encode("utf-8-sig"),
    lambda text: text.replace(",", " | ").encode(),                     # as Flickr30k's results.csv
    lambda text: ('{"filepath": "0.jpg", "title": ["one", "four"], "more": ["two", "five"]}\n'
                  '{"filepath": "1.jpg", "title": "three", "more": []}\n').encode()],
    ids=["plain", "gzip", "utf-16", "gzip of utf-16", "tabs", "bars", "json"])
def test_what_is_said_of_one_file_belongs_to_one_image(tmp_path, write):
    """In rows and in columns, however the table is packed."""
    spec = make_csv(tmp_path, write(ROWS))
    for columns, first, second in ((",caption=title", {"one", "four"}, {"three"}),
                                   (",caption=title,caption=more", {"one", "two", "four", "five"}, {"three"})):
        table = open_data(spec + columns)
        assert [set(texts) for texts in captions(table)] == [first, second] and grays(table) == [0, 1]
    batches = data.train_batches(len(table), 2, 0, range(20), 0, 1)
    assert all({index for _, index, *_ in batch} == {0, 1} for batch in batches), "no image twice in a batch"


@pytest.mark.parametrize("n", [1000, 1001, 1063])              # what an epoch's batches of 64 leave over: 40, 41, 39
def test_no_record_stands_in_for_many(n):
    """3% are bad: whatever an epoch leaves over, no record is used many times, or twice in a batch."""
    is_bad, uses = np.random.default_rng(1).random(n) < 0.03, np.zeros(n, int)
    for batch in data.train_batches(n, 64, 0, range(n // 64), 0, 1):
        used = [next(index for index in candidates if not is_bad[index]) for _, *candidates in batch]
        assert len(set(used)) == 64
        uses[used] += 1
    assert uses.max() <= 3 and uses.sum() == n // 64 * 64


@pytest.mark.parametrize("row", ['{"filepath": "0.jpg", "title": null}', '{"filepath": "0.jpg"}'])
def test_bad_rows_of_json(tmp_path, row):
    first, last = ('{"filepath": "2.jpg", "title": "a"}', '{"filepath": "1.jpg", "title": "b"}')
    table = open_data(make_csv(tmp_path, f"{first}\n{row}\n{last}\n\n"))
    assert refused("empty caption", table.read, 1) and [table.read(i).captions for i in (0, 2)] == [("a",), ("b",)]


def test_a_table_takes_little_more_memory_than_its_text(tmp_path):
    """A list of 15 million pairs fits."""
    spec = make_csv(tmp_path, "filepath,title\n" + "".join(f"{i % 3}.jpg?{i},{'word ' * 14}\n" for i in range(20_000)))
    (tmp_path / "0.jpg?0").write_bytes(jpeg())
    tracemalloc.start()
    table = open_data(spec)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 20_000 and kept < 200 * 20_000 and peak < 700 * 20_000


def test_a_table_from_a_pipe(tmp_path):
    make_csv(tmp_path, "")
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"printf 'filepath,title\\n0.jpg,one\\n' > {tmp_path}/pipe"])
    assert captions(open_data(f"csv:{tmp_path}/pipe")) == [("one",)] and writer.wait() == 0


def test_shards_with_several_captions_and_other_names(tmp_path):
    several = json.dumps({"caption": ["one", "", "two"]}).encode()
    shards = Shards(str(make_tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.json", b"\xef\xbb\xbf" + several)])))
    assert captions(shards) == [("one", "two")]
    members = [("d/1.image.jpg", jpeg(1)), ("d/1.caption.txt", b"one"), ("2.image.png", jpeg(2)),
               ("2.text.txt", b"two"), ("__MACOSX/d/._1.image.jpg", b"x"), ("d/._1.image.jpg", b"x")]
    shards = Shards(str(make_tar(tmp_path / "b.tar", members)))         # WebDataset cuts names at the first dot
    assert sorted(captions(shards)) == [("one",), ("two",)]
    assert shards.notes == ["2 hidden files (.NAME, __MACOSX), not read"]
    members = [("1.image.jpg", jpeg(1)), ("1.txt", b"one"), ("1.json", b"{}"), ("1.mask.png", jpeg(2))]
    shards = Shards(str(make_tar(tmp_path / "d.tar", members)))         # a .txt and a .json alone make no pair
    assert captions(shards) == [("one",)] and grays(shards) == [2]
    assert shards.notes == ["1 files differ from another of their pair in the extension alone, the last one is read"]
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    refused("gunzip", Shards, str(tmp_path / "c.tar.gz"))


def test_rows_that_look_wrong_are_noted(tmp_path):
    for text, note in (
            ('filepath,title\n0.jpg,"three rows\n1.jpg,became\n2.jpg,one"\n',
             "1 captions go over several lines: look for stray quotes"),
            ("filepath;title\n0.jpg;a cat; asleep\n1.jpg;a dog\n2.jpg;a bird\n",
             "1 rows have too many fields: captions with a ';' need quotes")):
        assert open_data(make_csv(tmp_path, text)).notes == [note]


# ---- folders --------------------------------------------------------------------------------------------------------

def make_folder(root, files: list[str]):
    for k, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(jpeg(k))
    return f"folder:{root}"


@pytest.mark.parametrize("files, split, classes, labels", [
    (["b/1.jpg", "a/1.png", "a/0.JPEG"], "train", ["a", "b"], [0, 0, 1]),
    (["b/1.jpg", "a/1.png", "a/0.JPEG"], "val", ["a", "b"], [0, 0, 1]),                 # no splits: the same for all
    (["train/ice_cream/1.jpg", "train/dog/1.jpg", "val/dog/1.jpg"], "train", ["dog", "ice cream"], [0, 1]),
    (["train/cat/1.jpg", "train/dog/1.jpg", "val/dog/1.jpg"], "val", ["cat", "dog"], [1]),      # labels as in train
    (["a/x/y/1.jpg", "a/0.jpg", "a/notes.txt", "b/2.jpg", ".git/1.jpg", "1.jpg"], "train", ["a", "b"], [0, 0, 1]),
    (["10/1.png", "9/1.png"], "train", ["9", "10"], [0, 1]),                            # numbers count as numbers
    (["a_2/1.png", "a_10/1.png", "a/1.png", "11/1.png"], "train", ["11", "a", "a 2", "a 10"], [0, 1, 2, 3]),
    (["Train/b/1.jpg", "Train/a/1.jpg", "Test/b/1.jpg"], "train", ["a", "b"], [0, 1]),
    (["Train/b/1.jpg", "Train/a/1.jpg", "Test/b/1.jpg"], "val", ["a", "b"], [1]),       # "test" stands in
    (["training/a/1.jpg", "VALID/b/1.jpg"], "val", ["a", "b"], [1]),
    (["train/a/1.jpg", "validation/b/1.jpg", "testing/a/1.jpg", "docs/x/1.jpg"], "test", ["a", "b"], [0]),
    (["train/1.jpg", "car/1.jpg", "test/1.jpg"], "train", ["car", "test", "train"], [0, 1, 2]),
    (["training_set/a/1.jpg", "test_set/b/1.jpg", "seg_train/x.txt"], "val", ["a", "b"], [1]),              # Kaggle's
    (["test_tube/a/1.jpg", "trainer/b/1.jpg"], "train", ["test tube", "trainer"], [0, 1]),
    (["a/1.jpg", "b/._1.jpg", "b/1.jfif", "b/2.JPE", "b/.ipynb_checkpoints/1.jpg", "__MACOSX/a/._1.jpg",
      ".ipynb_checkpoints/1.jpg"], "train", ["a", "b"], [0, 1, 1]),
])
def test_folder(tmp_path, files, split, classes, labels):
    found = open_data(make_folder(tmp_path, files), split, "classes")
    assert found.classes == classes and [found.read(i).label for i in range(len(found))] == labels
    assert captions(found) == [()] * len(labels)
    assert all((tmp_path / name).is_file() for name in names(found)) and len(set(names(found))) == len(labels)


def test_imagenet_as_it_comes(tmp_path):
    """Names of files and folders, gray and CMYK JPEGs; its ImageNet-21K without splits and with empty classes."""
    files = [f"{part}/{one}/{file}.JPEG" for one in ("n01443537", "n01440764") for part, file in (
        ("train", f"{one}_18"), ("train", f"{one}_3"), ("val", f"ILSVRC2012_val_0000{one[-4:]}"))]
    spec = make_folder(tmp_path / "in1k", files)
    PIL.Image.new("CMYK", (8, 8)).save(tmp_path / "in1k" / files[0], "JPEG")
    for part, labels in (("train", [0, 0, 1, 1]), ("val", [0, 1])):
        found = open_data(spec, part, "classes")
        assert found.classes == ["n01440764", "n01443537"]
        assert [found.read(i).label for i in range(len(found))] == labels
        assert all(data.decode(found.read(i).image).mode == "RGB" for i in range(len(found)))
    spec = make_folder(tmp_path / "in21k", ["n00004475/n00004475_6590.JPEG", "n00006024/n00006024_1.JPEG"])
    (tmp_path / "in21k" / "n00005787").mkdir()
    (tmp_path / "in21k" / "n00004475.tar").write_bytes(b"")
    (tmp_path / "in21k" / "classnames.txt").write_text("n00004475\torganism\tbeing\n\nn00005787\tbenthos, or so\n"
                                                       "n00006024\theterotroph\nn03\tnot here\n")
    named, = data.name_classes([open_data(spec, "train", "classes")])
    assert named.classes == ["organism\tbeing", "benthos, or so", "heterotroph"] and len(named) == 2
    assert named.read(1).captions[0] == "a bad photo of a heterotroph." and named.read(1).text_label == 2


@pytest.mark.parametrize("files, class_names, message", [
    ([], None, "cannot read"),
    (["a/notes.txt", "b/notes.txt"], None, "holds no images"),
    (["1.jpg", "2.jpg"], None, "sorted into a folder for each class as docs/DATA.md says, holds no images"),
    (["train/n01440764/1.JPEG", "train/n01443537/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG"], None,
     "no folder 'val' with a folder for each class in it, only train"),
    (["00000/000000000.jpg", "00000/000000000.txt", "00001/000010000.jpg", "00001/000010000.txt"], None,
     "00000 holds pairs as img2dataset leaves them"),
    (["val/a/1.jpg"], None, "has no folder 'train' with a folder for each class in it, only val"),
    (["a/1.jpg", "b/1.jpg"], "a great white shark\n", "has no line a<TAB>name"),
    (["a/1.jpg", "b/1.jpg"], "a\tcat\n", "has no line b<TAB>name"),
])
def test_folder_that_cannot_be_used(tmp_path, files, class_names, message):
    spec = make_folder(tmp_path / "root", files)
    if class_names:
        (tmp_path / "root" / "classnames.txt").write_text(class_names)
    refused(message, open_data, spec, "val" if "'val'" in message else "train", "classes")


def test_what_is_not_read_of_a_folder_is_counted(tmp_path):
    files = ["Train/a/1.jpg", "Train/a/._1.jpg", "Train/a/notes.txt", "Test/a/1.jpg", "docs/x.jpg"]
    spec = make_folder(tmp_path, files)
    assert open_data(spec, "val", "classes").notes == [
        "1 folders beside those of the splits, not read", f"{tmp_path} has no folder 'val': 'Test' stands in for it"]
    make_folder(tmp_path, ["Train/b/1.jpg"])
    assert f"1 of 2 classes have no image in {tmp_path}/Test, as b" in open_data(spec, "test", "classes").notes
    assert "2 files that are no images by their names, or hidden, not read" in open_data(spec, "train", "classes").notes
    spec = make_folder(tmp_path / "loose", ["a/1.jpg", "b/2.jpg", "3.jpg"])
    (tmp_path / "loose" / "b" / "more").symlink_to(tmp_path / "loose")                          # a circle
    found = open_data(spec, "train", "classes")
    assert names(found) == ["a/1.jpg", "b/2.jpg"]
    assert found.notes == ["1 images beside the folders of the classes, not read",
                           "1 links to folders inside classes, not followed"]


def test_names_that_are_not_utf8(tmp_path):
    """As an old zip leaves them: they can be said, hashed and read."""
    cafe = os.fsdecode(b"caf\xe9")
    found = open_data(make_folder(tmp_path, [f"{cafe}/1.jpg", "star/1.jpg"]), "train", "classes")
    assert found.classes == ["caf\u00e9", "star"] and names(found)[0] == "caf\u00e9/1.jpg" and grays(found) == [0, 1]
    assert len(hash_names(found)) == 64 and len(data.fingerprint([cafe])) == 8
    half = r'{"filepath": "\ud83d.jpg", "title": "half of an emoji"}'
    table = open_data(make_csv(tmp_path, '{"filepath": "0.jpg", "title": "x"}\n' + half))
    assert names(table) == ["0.jpg", r"\ud83d.jpg"] and len(hash_names(table)) == 64
    refused("unreadable file", table.read, 1)
    make_tar(tmp_path / f"{cafe}.tar", pairs(2))
    shards = open_data(f"shards:{tmp_path}/{cafe}.tar")
    assert names(shards)[0] == "caf\u00e9/000000000" and len(hash_names(shards)) == 64


# ---- coco and flickr30k ---------------------------------------------------------------------------------------------

def make_coco(root, year: str, change=lambda content: content):
    images = {"train": [4, 2], "val": [7]}
    (root / "annotations").mkdir(parents=True)
    for split, ids in images.items():
        (root / f"{split}{year}").mkdir()
        for k in ids:
            (root / f"{split}{year}" / f"{k}.jpg").write_bytes(jpeg(k))
        content = {"images": [{"id": k, "file_name": f"{k}.jpg"} for k in ids],
                   "annotations": [{"image_id": k, "caption": f"caption {c} of {k}"} for c in range(5) for k in ids]}
        (root / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps(change(content)))
    return f"coco:{root}"


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_captions(tmp_path, year):
    spec = make_coco(tmp_path, year)
    train, val = open_data(spec), open_data(spec, "val")
    assert names(train) == ["4.jpg", "2.jpg"] and grays(train) == [4, 2]
    assert captions(train) == [tuple(f"caption {c} of {k}" for c in range(5)) for k in (4, 2)]
    assert captions(val) == [tuple(f"caption {c} of 7" for c in range(5))]
    rng = np.random.default_rng(0)
    assert {data.pick_caption(val.read(0), rng) for _ in range(100)} == set(val.read(0).captions)


def without(entry: dict, key: str) -> dict:
    return {k: v for k, v in entry.items() if k != key}


@pytest.mark.parametrize("change, message", [
    (lambda c: [c], "captions_train2017.json: wanted an object with 'images' of type list"),
    (lambda c: without(c, "images"), "captions_train2017.json: wanted an object with 'images'"),
    (lambda c: dict(c, annotations=None), "captions_train2017.json: wanted an object with 'annotations'"),
    (lambda c: dict(c, images=[c["images"][0], {"id": 2}]), "images[1]: wanted an object with 'file_name' of type str"),
    (lambda c: dict(c, images=["4.jpg"]), "images[0]: wanted an object with 'id'"),
    (lambda c: dict(c, annotations=[{"image_id": 99, "caption": "x"}]), "annotations[0]: there is no image 99"),
    (lambda c: dict(c, annotations=[{"image_id": 4, "caption": 5}]), "annotations[0]: wanted an object with 'caption'"),
    (lambda c: dict(c, annotations=[]), "holds no images"),
    (lambda c: dict(c, images=[dict(i, file_name=f"gone{i['id']}") for i in c["images"]]), "of the first 2 images"),
])
def test_malformed_coco(tmp_path, change, message):
    refused(message, lambda: open_data(make_coco(tmp_path, "2017", change)))


def test_coco_that_is_not_json(tmp_path):
    spec = make_coco(tmp_path, "2017")
    for content in ("", "{", '{"images": [}', "\xff", "[" * 100_000):
        (tmp_path / "annotations" / "captions_train2017.json").write_text(content, encoding="latin-1")
        assert "captions_train2017.json" in refused("cannot read ", open_data, spec)


def test_coco_images_without_captions_and_bad_captions(tmp_path):
    def change(content):
        kept = [a for a in content["annotations"] if a["image_id"] != 2]
        bad = [dict(kept[0], caption="  "), dict(kept[0], caption="half a pair \ud83d")]
        return dict(content, annotations=bad + kept[1:3])
    train = open_data(make_coco(tmp_path, "2017", change))
    assert train.notes == [f"1 images of {tmp_path}/annotations/captions_train2017.json have no caption"]
    assert captions(train) == [("caption 1 of 4", "caption 2 of 4")]


def make_karpathy(root, coco: bool, change=lambda content: content):
    splits = ["train", "restval", "val", "test", "test"] if coco else ["train", "train", "val", "test", "test"]
    images = []
    for k, split in enumerate(splits):
        folder = ("train2014" if split == "train" else "val2014") if coco else "flickr30k-images"
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{k}.jpg").write_bytes(jpeg(k))
        images.append({"filename": f"{k}.jpg", "split": split, "imgid": k, "sentences": [
            {"raw": f"caption {c} of {k}", "tokens": []} for c in range(5)], **({"filepath": folder} if coco else {})})
    name = "coco" if coco else "flickr30k"
    (root / f"dataset_{name}.json").write_text(json.dumps(change({"images": images})))
    return f"{name}:{root}"


@pytest.mark.parametrize("coco", [True, False])
def test_karpathy_splits(tmp_path, coco):
    spec = make_karpathy(tmp_path, coco)
    for split, want in ((None, [3, 4]), ("test", [3, 4]), ("val", [2]), ("train", [0, 1])):
        found = open_data(spec, split, task="retrieval")
        assert grays(found) == want
        assert captions(found) == [tuple(f"caption {c} of {k}" for c in range(5)) for k in want]


@pytest.mark.parametrize("change, message", [
    (lambda image: without(image, "split"), "images[0]: wanted an object with 'split'"),
    (lambda image: dict(image, split="dev"), "has no image of the split 'test', only {'dev': 5}"),
    (lambda image: without(image, "filename"), "images[0]: wanted an object with 'filename'"),
    (lambda image: dict(image, sentences=["x"]), "images[3]: wanted an object with 'raw'"),
    (lambda image: "0.jpg", "images[0]: wanted an object with 'split'"),
])
def test_malformed_karpathy(tmp_path, change, message):
    spec = make_karpathy(tmp_path, False, lambda content: {"images": [change(i) for i in content["images"]]})
    assert "dataset_flickr30k.json" in refused(message, lambda: open_data(spec, task="retrieval"))


# ---- all data sets --------------------------------------------------------------------------------------------------

def test_each_format_is_opened_by_its_line_of_the_table():
    for kind, format in data.FORMATS.items():
        assert data.kind_of(format.spec) == kind and format.spec in data.specs() and format.tasks
        for task in format.tasks:
            assert format.spec in data.specs(task)
            if kind != "shapes":
                refused("nowhere", open_data, f"{kind}:nowhere", "train", task)


@pytest.mark.parametrize("spec, split, task, message", [
    ("tar:x.tar", None, "captions", "cannot open 'tar:x.tar': wanted shapes, shards:PATH-{00000..00999}.tar, csv:FILE"),
    ("", None, "captions", "wanted shapes"),
    ("csv:x.csv", None, "classes", "cannot open 'csv:x.csv' for classes: wanted shapes, folder:DIR"),
    ("folder:x", None, "retrieval", "cannot open 'folder:x' for retrieval: wanted shapes"),
    ("shards:nowhere-{0..9}.tar", None, "captions", "10 of 10 shards are missing, the first is nowhere-0.tar"),
    ("csv:nowhere.csv", None, "captions", "cannot read nowhere.csv: No such file"),
    ("folder:nowhere", None, "classes", "cannot read nowhere: No such file"),
    ("coco:nowhere", None, "captions", "wanted nowhere/annotations/captions_train2017.json"),
    ("coco:nowhere", "test", "captions", "no captions of the split 'test'"),
    ("flickr30k:nowhere", None, "retrieval", "cannot read nowhere/dataset_flickr30k.json"),
])
def test_open_data_says_what_is_wrong(spec, split, task, message):
    refused(message, open_data, spec, split, task)


def test_mixed_and_the_hash_of_its_names(tmp_path):
    make_tar(tmp_path / "s.tar", pairs(3))
    table = make_csv(tmp_path, "filepath,title\n2.jpg,two\n1.jpg,one\n")
    mixed = Mixed([open_data(f"shards:{tmp_path}/s.tar"), open_data(table)])
    want = ["s/000000000", "s/000000001", "s/000000002", "2.jpg", "1.jpg"]
    assert mixed.classes is None and names(mixed) == want and grays(mixed) == [0, 1, 2, 2, 1]
    assert hash_names(mixed) == hashlib.sha256("".join(f"{name}\n" for name in want).encode()).hexdigest()


# ---- commands -------------------------------------------------------------------------------------------------------

class Words:
    """Stands in for a tokenizer: a token a word, start and end."""
    def length(self, text: str) -> int:
        return len(text.split()) + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_check_counts_and_names_what_is_bad(tmp_path, workers, capsys):
    make_tar(tmp_path / "s.tar", [*pairs(3), ("a.jpg", jpeg(size=(40, 20))), ("a.txt", b"five words in all here"),
                                  ("b.jpg", jpeg()[:200]), ("b.txt", b"x"), ("c.jpg", b"404"), ("c.txt", b"x"),
                                  ("d.jpg", b"4041"), ("d.txt", b"x"), ("e.jpg", jpeg()), ("e.txt", b""),
                                  ("f.txt", b"x")])
    shards = open_data(f"shards:{tmp_path}/s.tar")
    report = data.check(shards, Words(), context_length=6, workers=workers)
    assert report["records"] == 8 and report["bad"] == 4
    assert report["reasons"] == {"corrupt image": 1, "not an image": 2, "empty caption": 1}
    assert [name for name, _ in report["bad_records"]] == ["s/b", "s/c", "s/d", "s/e"]
    assert (report["captions"], report["tokens"], report["truncated"]) == (4, [4, 4, 7], 1)
    assert report["sample_hash"] == hash_names(shards) and report["notes"] == ["1 captions without an image"]
    printed = capsys.readouterr().out
    assert "bad: 4" in printed and "s/c: not an image" in printed and report["sample_hash"] in printed


def test_preview_draws_pictures_captions_classes_and_bad_records(tmp_path):
    make_tar(tmp_path / "s.tar", [*pairs(5), ("b.jpg", b"404"), ("b.txt", b"x"), ("c.jpg", jpeg(9, (400, 8))),
                                  ("c.txt", ("W" * 500 + " \u732b \u202e \0").encode())])
    data.preview(open_data(f"shards:{tmp_path}/s.tar"), tmp_path / "a.png")
    sheet = np.asarray(PIL.Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * (4 * 18 + 224 + 6), 6 * 230, 3), "of seven records one stands in the second row"
    assert (sheet == 211).all(axis=-1).sum() >= 224 * 224, "a bad one is light gray"
    data.preview(open_data(make_folder(tmp_path / "root", ["tea/1.jpg"]), task="classes"), tmp_path / "b.png")
    assert (np.asarray(PIL.Image.open(tmp_path / "b.png"))[:18] < 128).any(), "the class is written above"
    more = make_folder(tmp_path / "more", ["milk/1.jpg", "juice/1.jpg"])
    data.main(["preview", "--data", f"folder:{tmp_path}/root", "--data", more, "--out", str(tmp_path / "c.png")])
    assert (np.asarray(PIL.Image.open(tmp_path / "c.png"))[:18] < 128).any(), "of several lists of classes the file"


def test_commands_read_what_only_evaluation_reads(tmp_path, capsys, monkeypatch):
    home = tmp_path / "ADEChallengeData2016"
    make_folder(home / "images", ["training/1.jpg", "validation/1.jpg"])
    for part in ("training", "validation"):
        (home / "annotations" / part).mkdir(parents=True)
        PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(home / "annotations" / part / "1.png")
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / "coco" / part).mkdir(exist_ok=True)
        (tmp_path / "coco" / part / "1.jpg").write_bytes(jpeg(size=(50, 40)))
        (tmp_path / "coco" / "annotations" / f"instances_{part}.json").write_text(json.dumps(dict(
            images=[dict(id=1, file_name="1.jpg", width=50, height=40)], categories=[dict(id=1, name="cat")],
            annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0,
                              segmentation=[[1, 1, 5, 1, 5, 5, 1, 5]])])))
    digits = tmp_path / "classification" / "mnist_20211008"
    make_folder(digits, ["val/0/a.jpg", "1/b.jpg"])              # unpacked in a folder of its own, and beside the list
    (digits / "test.txt").write_text("val.zip@0/a.jpg 0\nval.zip@1/b.jpg 1\n")
    (digits / "labels.txt").write_text("zero\none\n")
    for spec, records, classes in (("ade20k", 1, 150), ("coco", 1, 1), ("icinw", 2, 2), ("folder", 3, 3)):
        root = {"coco": tmp_path / "coco", "folder": tmp_path / "tea"}.get(spec, tmp_path)
        if spec == "folder":
            make_folder(root, ["a/1.jpg", "b/1.jpg", "c/1.jpg"])
        data.main(["check", "--data", f"{spec}:{root}"])
        printed = capsys.readouterr().out
        assert f"records: {records}\nbad: 0\n" in printed and f"\nclasses: {classes}\n" in printed, spec
        data.main(["preview", "--data", f"{spec}:{root}", "--out", str(tmp_path / "grid.png")])
        assert f"wrote {tmp_path}/grid.png: {records} of {records} records" in capsys.readouterr().out
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path / "full")
    (tmp_path / "full" / "grid.png").mkdir()                # what preview would write cannot be: no matter
    data.main(["bpe", "--vocab-size", "520", "--data", "shapes:train=9", "a red circle"])
    assert "'a red circle': " in capsys.readouterr().out
    (digits / "val" / "0" / "a.jpg").unlink()
    (digits / "val.zip").write_bytes(b"PK")
    refused(f"cd {digits} && unzip -q val.zip -d val", data.icinw, str(tmp_path))


@pytest.mark.parametrize("wrong", ["check --workers -2", "check --context-length 0", "bpe --vocab-size two",
                                   "check --task icons", "preview --out x.xyz", "preview --out sheet",
                                   "preview --out x.psd", "preview --out nowhere/x.png"])
def test_options_that_cannot_be_are_refused_before_any_work(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_for_reading", None)
    with pytest.raises((SystemExit, UserError)) as told:
        data.main(wrong.split())
    err = capsys.readouterr().err
    assert "wanted a" in err or "invalid choice" in err or wrong.split()[-1] in str(told.value)
    assert not list(tmp_path.iterdir())


def test_progress_speaks_every_five_seconds(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    assert list(data.progress(iter("abcd"), 4, "letters")) == [*"abcd"]
    assert capsys.readouterr().err == "letters: 1 of 4, 18 s left\nletters: 3 of 4, 4 s left\n"
    assert list(data.progress("abcd", 4, "letters", speaks=False)) == [*"abcd"] and not capsys.readouterr().err


class Group:
    """Stands in for torch.distributed: says what became of the process group."""
    def __init__(self, ended: list):
        self.is_initialized, self.destroy_process_group = lambda: True, lambda: ended.append("destroyed")


@pytest.mark.parametrize("raised, status, end", [
    (None, 0, "destroyed"),
    (SystemExit(3), 3, "destroyed"),
    (UserError("no\nsuch \x1b file"), 2, "destroyed"),
    (KeyboardInterrupt(), 130, "left"),
    (ZeroDivisionError("a fault"), 1, "left"),                 # nobody waits for the others
])
def test_run_ends_a_script(raised, status, end, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def main():
        if raised:
            raise raised

    def leave(status):
        ended.append("left")
        raise Left(status)
    ended = []
    monkeypatch.setattr(data.sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(data.os, "_exit", leave)
    for group, how in ((Group(ended), [end]), (data.dist, [])):
        ended.clear()
        monkeypatch.setattr(data, "dist", group)
        with pytest.raises((SystemExit, Left)) as stop:
            data.run(main)
        assert (stop.value.args or (0,))[0] == status and ended == how
    said = capsys.readouterr().err
    told = {2: "error: no\\nsuch \\x1b file\n", 130: "interrupted\n", 1: "ZeroDivisionError: a fault"}
    assert said.count(told.get(status, "no line")) == 2 * (status in told) and (said or status not in told)


@pytest.mark.slow
def test_nobody_reads_the_output():
    code = "import data; data.run(lambda: [print(k, flush=True) for k in range(10 ** 6)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=pathlib.Path(data.__file__).parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
