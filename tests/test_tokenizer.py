"""The byte-pair tokenizer against open_clip's, against a slow BPE written from its definition, and bad input."""
import collections
import gzip
import itertools
import random
import tarfile

import ftfy
import pytest
import torch

import data
from conftest import SHARED, needs_shared
from data import BytePairTokenizer, UserError, trim

CLIP_FILE = SHARED / "bpe_simple_vocab_16e6.txt.gz"

NASTY = {
    "nothing": ["", " ", "\n\t\r\f\v", "\x00\x01", "\u3000\u00a0\u2028", "&#0;", "\ufeff"],
    "contractions": ["it's I'll we've you're he'd can't I'm", "'s's 'S 'LL ''t", "rock'n'roll o'clock", "\u2019s",
                      "'\u017f 'r\u0435"],
    "numbers": ["2024", "3.14e-10", "x2y3", "½ ² ⅷ ٣ 九", "12\u00a0345"],
    "punctuation": ["!!!...???", "a,b.c;d", "----====____", "a\\b/c|d", "$5.00 (20%) #1 @you *", "!", "! !", "</w>",
                    "a</w>b"],
    "quotes": ["“a” ‘b’ „c‟ ‚d‛", "it’s", "“’‘”–—…", "„Hund“", "‚Hund‘", "é’s", "”é “É", "é“x", "À “A”"],
    "case": ["DOG Dog dOG", "ΑΣ ΣΑΣ. Σ ΑΣ’Α", "İstanbul DİYARBAKIR I ı", "STRAẞE ß",
             "\u212a \u212b Ⓐ ǅ", "ﬁ ﬂ ﬃ ĳ ŉ"],
    "accents": ["café", "cafe\u0301", "a\u0301\u0316\u0317", "\u0301", "Å Å A\u030a", "ÀÉÎÕÜ àéîõü"],
    "scripts": ["寿司とビール", "собака", "สุนัข", "कुत्ता", "كلب", "כלב",
                "개 \u1112\u1161\u11ab", "ｆｕｌｌ　ｗｉｄｔｈ ﾊﾝｶｸ"],
    "emoji": ["🐶", "👩‍👩‍👧‍👦👍🏽", "🇩🇪", "❤️ ❤", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "a🐶b🐶🐶"],
    "mojibake": ["cafÃ©", "â€œquotedâ€\x9d â€™", "Ã la mode", "ÃƒÂ©", "Ð¡Ð¾Ð±Ð°ÐºÐ°",
                 "rÃ©sumÃ© 漢字", "\x93hi\x94 \x85"],
    "html": ["a &amp; b", "&amp;amp; &amp;amp;amp;", "&lt;b&gt;x&lt;/b&gt;", "<b>&amp;</b>", "a<b\n&eacute;",
             "&eacute\n<\n&eacute;", "<i>&amp;amp;eacute;", "&notit; &not", "&#39;s &#x27;S",
             "&NewLine;&nbsp;&ZeroWidthSpace;", "&#128;&#xD800;&#x110000;&#99999999999;", "AT&T &"],
    "control": ["a\x00b", "a\x1cb\x1db", "a\x0bb", "a\x7fb", "\x1b[31mred\x1b[0m", "\x1b\x1b[0m[0m", "a\x85b",
                "\u200b\u200ea\u202e", "a\r\nb\rc", "\ufffc\ufff9a", "a\u2029b"],
    "specials": ["<start_of_text>", "<end_of_text>", "a<end_of_text>b", "<START_OF_TEXT> <<end_of_text>>",
                 "<\u017ftart_of_text>", "<start_of_text", "&lt;end_of_text&gt;", "<end_of_text>" * 80],
    "surrogates": ["\ud800", "a\udfffb", "\ud83d\udc36", "\udc36\ud83d", "\ud800é&amp;"],
    "long": ["a" * 3000, "ab" * 2000, "-" * 4000, "dog " * 1000, "ü" * 1500,
             "pneumonoultramicroscopicsilicovolcanoconiosis"],
}


def random_strings(number, seed):
    """Texts of all of Unicode, surrogates included, with a liking for what cleaning changes and what BPE merges."""
    rng = random.Random(seed)
    likely = "etaoin shrdlu" * 4 + "'’“”–.,!?0123456789&#;<>/_-ÃÂâ€™œ©é漢Σ"
    likely += "\n\r\t\x1b[\x00\x0b\x1c\x7f\x85\xa0\u0301\u200d\ufe0f"
    pieces = ["'s", "'LL", "&amp;", "&lt;", "&#39;", "&eacute", "Ã©", "â€™", "<end_of_text>", "\r\n", "dog", "\x1b[0m"]
    blocks = [(0x00, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0xD800, 0xFFFF),
              (0x1F300, 0x1FAFF), (0x0, 0x10FFFF)]
    for _ in range(number):
        text = ""
        for _ in range(rng.randrange(1, 25)):
            kind = rng.random()
            text += (rng.choice(likely) if kind < 0.6 else rng.choice(pieces) if kind < 0.75
                     else chr(rng.randint(*rng.choice(blocks))))
        yield text


@pytest.fixture(scope="module")
def clip():
    if not CLIP_FILE.exists():
        pytest.skip("needs CLIP's merges in shared/data")
    return BytePairTokenizer.from_file(CLIP_FILE)


@pytest.fixture(scope="module")
def peer():
    """open_clip's tokenizer and ours, of the same file."""
    pytest.importorskip("open_clip", reason="open_clip is the reference")
    from open_clip.tokenizer import SimpleTokenizer, default_bpe
    return SimpleTokenizer(clean="lower"), BytePairTokenizer.from_file(default_bpe())


@pytest.fixture(scope="module")
def toy():
    return BytePairTokenizer.train(["a red circle above a blue square", "two red squares", "Größe: 日本"] * 3, 560)


# --- against open_clip -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", NASTY)
def test_equals_open_clip_on_nasty_strings(peer, kind):
    theirs, ours = peer
    for text in NASTY[kind]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, ascii(text[:80])
        assert ours.decode(ids) == theirs.decode(ids), ascii(text[:80])
        assert ours.length(text) == len(theirs.encode(text[:data.LONGEST])) + 2, ascii(text[:80])


def test_equals_open_clip_on_random_unicode(peer):
    theirs, ours = peer
    for text in random_strings(3000, seed=0):
        assert ours.encode(text) == theirs.encode(text), ascii(text)


@pytest.mark.parametrize("context_length", [
    77,     # CLIP's
    16,     # cuts many
    2,      # room for start and end only
])
def test_rows_equal_open_clip(peer, context_length):
    theirs, ours = peer
    texts = [*itertools.chain.from_iterable(NASTY.values())]
    rows = ours(texts, context_length)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, theirs(texts, context_length))
    assert torch.equal(ours(texts[9], context_length), theirs(texts[9], context_length)), "a single string"
    assert ours([], context_length).shape == (0, context_length)


@needs_shared
def test_real_captions_equal_open_clip(peer):
    theirs, ours = peer
    texts = []
    for shard in sorted((SHARED / "pairs").glob("*.tar")):
        with tarfile.open(shard) as tar:
            texts += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    assert torch.equal(ours(texts), theirs(texts))                                  # fills the cache
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]     # reads it


def test_vocabulary_and_decoding_equal_open_clip(peer):
    theirs, ours = peer
    assert (ours.vocab_size, ours.sot, ours.eot) == (theirs.vocab_size, theirs.sot_token_id, theirs.eot_token_id)
    assert {symbol: i for i, symbol in enumerate(ours.symbols)} == theirs.encoder
    rng = random.Random(1)
    for _ in range(500):    # characters cut in two, end marks anywhere
        ids = [rng.choice([rng.randrange(512), rng.randrange(ours.vocab_size)]) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)


def test_trained_vocabulary_means_the_same_to_open_clip(peer, tmp_path):
    texts = [*random_strings(300, seed=2)] + NASTY["contractions"] * 9
    ours = BytePairTokenizer.train(texts, 700)
    assert len(ours.merges) > 50
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(("header\n" + ours.state()["merges"]).encode()))
    theirs = type(peer[0])(bpe_path=str(path))
    assert (ours.vocab_size, ours.eot) == (theirs.vocab_size, theirs.eot_token_id)
    for text in [*random_strings(500, seed=3), *itertools.chain.from_iterable(NASTY.values())]:
        assert ours.encode(text) == theirs.encode(text), ascii(text[:80])


@pytest.mark.parametrize("text", [
    "a photo of a dog, " * 60_000,      # plain
    "é" + " Der Hund läuft." * 60_000,  # for ftfy to read
    "🐶" * 250_000,                     # one word of a million bytes
    "漢字 <end_of_text> " * 60_000,     # an end token in the text
])
def test_a_caption_of_a_megabyte_equals_the_start_of_it(peer, text):
    theirs, ours = peer                 # the whole would take open_clip minutes
    assert torch.equal(ours(text), theirs(text[:2_000]))


# --- against what is known or slow -----------------------------------------------------------------------------------
@pytest.mark.parametrize("text, ids", [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),      # ids that CLIP's users quote
    ("Hello World!", [3306, 1002, 256]),
    ("!!", [748]),                                          # joined
    ("", []),
])
def test_known_ids(clip, text, ids):
    assert clip.encode(text) == ids
    assert clip(text)[0].tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))


@pytest.mark.slow
def test_a_symbol_is_what_its_bytes_merge_into(clip, toy):
    """The premise of looking up whole words, true of any vocabulary that was learned from text."""
    for tokenizer in clip, toy:
        for i, (left, right) in enumerate(tokenizer.merges, 512):
            chars = list((left + right).removesuffix("</w>"))
            if right.endswith("</w>"):
                chars[-1] += "</w>"
            assert tokenizer.merge([tokenizer.ids[char] for char in chars]) == [i]


def slow_merges(texts, vocab_size):
    """BPE from its definition: count all pairs, join the best one everywhere, start again.  Letters and spaces only."""
    words = [[*word[:-1], word[-1] + "</w>"] for text in texts for word in text.split()]
    order = [chr(i) for i in range(33, 127)] + [chr(i) + "</w>" for i in range(33, 127)]      # by id
    merges = []
    while len(merges) < vocab_size - 514:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], order.index(pair[0]), order.index(pair[1])), default=None)
        if counts[best] < 2:
            break
        merges.append(best)
        order.append("".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


@pytest.mark.parametrize("texts, vocab_size, learned", [
    (["low low low low low lower lower newest newest widest"], 520, 6),      # vocab_size reached
    (["aaaaaaa aaaa aaa aa a baaab"], 600, None),                            # pairs that overlap
    (["abcd bcda cdab dabc"] * 2, 600, None),                                # ties
    ([" ".join("".join(random.Random(i).choices("abcde", k=i % 9 + 1)) for i in range(400))], 640, None),
    (["all words differ"], 600, 0),                                          # no pair occurs twice
    (["", " "], 600, 0),                                                     # nothing to learn from
])
def test_training_equals_the_slow_definition(texts, vocab_size, learned):
    tokenizer = BytePairTokenizer.train(texts, vocab_size)
    assert tokenizer.merges == slow_merges(texts, vocab_size)
    assert learned is None or len(tokenizer.merges) == learned
    assert tokenizer.vocab_size == 514 + len(tokenizer.merges) <= vocab_size
    for text in texts:
        pieces = [tokenizer.symbols[i] for i in tokenizer.encode(text)]
        words = [[*word[:-1], word[-1] + "</w>"] for word in text.split()]
        for pair in tokenizer.merges:                                        # encoding replays the merges in order
            for word in words:
                for i in range(len(word)):
                    if tuple(word[i : i + 2]) == pair:
                        word[i : i + 2] = ["".join(pair)]
        assert pieces == [symbol for word in words for symbol in word]


def test_training_takes_neither_the_order_of_captions_nor_special_tokens_into_account():
    texts = [*random_strings(200, seed=4)]
    specials = ["<start_of_text> <end_of_text>"] * 9
    assert BytePairTokenizer.train(texts + specials, 700).merges == BytePairTokenizer.train(texts[::-1], 700).merges
    assert BytePairTokenizer.train(specials, 600).encode("<end_of_text>") == [513]


@pytest.mark.slow
def test_plain_text_needs_no_ftfy():
    """All triples of what is plain and acts in some rule of ftfy's, and longer random ones."""
    plain = "aZ0 .,?!<;'\"#\r\n\t‘’“”–—…"
    rng = random.Random(5)
    texts = ["".join(triple) for triple in itertools.product(plain, repeat=3)]
    texts += ["".join(rng.choices(plain + "\f()[]_~^$", k=40)) for _ in range(500)]
    for text in texts:
        assert data.PLAIN.fullmatch(text)
        assert data.clean(text) == " ".join(ftfy.fix_text(text).split()).lower(), ascii(text)


@pytest.mark.parametrize("text, cleaned", [
    ("  Two\t Dogs\n", "two dogs"),
    ("caf&eacute; &amp;amp; bar", "café & bar"),        # escaped twice
    ("<b>caf&amp;eacute;</b>", "<b>café</b>"),          # here ftfy leaves both to html.unescape
    ("a\x1cb", "ab"),                                   # a control character goes, though Python takes it for space
    ("&#" + "1" * 5000 + "; A", "&#" + "1" * 5000 + "; a"),    # too many digits for int: left alone (open_clip fails)
])
def test_clean(text, cleaned):
    assert data.clean(text) == cleaned


# --- behavior of its own ---------------------------------------------------------------------------------------------
def test_round_trip(toy):
    for text in ("a red circle", "two squares, one above", "größe 日本 🐶", "unseen wörds", "it's 100%"):
        assert toy.decode(toy.encode(text)) == "".join(f"{word} " for word in data.WORD.findall(text))
        assert toy.decode(toy(text, 9)[0]).startswith("<start_of_text>"), "a row decodes too"


def test_a_cut_caption_keeps_its_end_token(toy):
    text = "a red circle above a blue square"
    whole = [toy.sot, *toy.encode(text), toy.eot]
    assert toy.length(text) == len(whole)
    for length in range(2, len(whole) + 3):
        row = whole if length >= len(whole) else whole[:length - 1] + [toy.eot]
        assert toy(text, length)[0].tolist() == row + [toy.pad] * (length - len(row))


def test_state_survives_a_checkpoint(toy, tmp_path):
    torch.save({"tokenizer": toy.state()}, tmp_path / "last.pt")
    again = BytePairTokenizer.from_state(torch.load(tmp_path / "last.pt", weights_only=True)["tokenizer"])
    assert (again.merges, again.vocab_size, again.symbols) == (toy.merges, toy.vocab_size, toy.symbols)
    assert again.encode("a red square, größe") == toy.encode("a red square, größe")
    assert BytePairTokenizer.from_state(BytePairTokenizer([]).state()).vocab_size == 514, "no merges at all"


def test_the_cache_is_bounded_and_changes_nothing(toy, monkeypatch):
    monkeypatch.setattr(data, "CACHED_CHUNKS", 3)
    small = BytePairTokenizer.from_state(toy.state())
    text = "a red circle, a blue square; two red squares " * 3 + "x" * 100
    assert small.encode(text) == toy.encode(text) == small.encode(text)
    assert len(small.cache) <= 3 and max(map(len, small.cache)) < 100


@pytest.mark.parametrize("text", [
    "x" * 1_000_000,                    # one word
    "&" + "amp;" * 250_000,             # ftfy unescapes one layer a pass
    "a" + "\u0301\u0316" * 500_000,     # normalization sorts the accents
    "é" + "\n" * 1_000_000,             # ftfy works line by line
])
def test_a_hostile_megabyte_is_read_in_part(toy, text):
    row = toy(text)[0]
    assert row[0] == toy.sot and (row == toy.eot).sum() == 1
    assert toy.length(text) <= 2 * data.LONGEST + 2
    BytePairTokenizer.train([text], 520)


@pytest.mark.parametrize("lengths, multiple, kept", [
    ([3, 5, 2], 1, 5),      # the longest caption
    ([3, 5, 2], 4, 8),      # rounded up
    ([3, 9, 2], 4, 10),     # never above the width
    ([10], 1, 10),          # full already
    ([2], 8, 8),
])
def test_trim(lengths, multiple, kept):
    tokens = torch.zeros(len(lengths), 10, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[: length - 1] = 7
        row[length - 1] = 9
    tokens[0, 0] = 9        # an end token that stood in the text is not the last one
    assert torch.equal(trim(tokens, 9, multiple), tokens[:, :kept])


PROSE = ("header\n" + "the cat\n" * 50_000).encode()


@pytest.mark.parametrize("content, message", [
    (None, "No such file"),
    (b"", "0 lines"),                                                       # empty
    (b"\x00\xff\xfe" * 1000, "0 lines"),                                    # binary
    (b"\x1f\x8b" + b"junk" * 100, "vocabulary: want CLIP's"),               # a gzip's first bytes, then none of it
    (gzip.compress(PROSE)[:-50], "end-of-stream"),                          # cut off
    (gzip.compress(PROSE)[:10] + b"\xff" * 20, "invalid block"),            # damaged
    (gzip.compress(b"header\ni n\n"), "1 lines|2 lines"),                   # too short
    (PROSE, "merge 1 is 'the cat'"),                                        # words, not symbols
    (b"header\n" + b"i n\n" * 50_000, "merge 2 is 'i n'"),                  # twice the same
    (b"header\n" + b"x" * 1_000_000 + b"\n" * 50_000, "merge 1 is 'x+'"),   # quoted in part
])
def test_a_wrong_file_is_a_user_error_of_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocabulary").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        BytePairTokenizer.from_file(tmp_path / "vocabulary")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_lengths_that_cannot_be():
    with pytest.raises(UserError, match="513: want 514"):
        BytePairTokenizer.train(["a"], 513)
    with pytest.raises(UserError, match="1: want 2"):
        BytePairTokenizer([])("a", 1)


def test_the_file_may_be_unpacked(clip, tmp_path):
    (tmp_path / "plain").write_bytes(gzip.decompress(CLIP_FILE.read_bytes()))
    assert BytePairTokenizer.from_file(tmp_path / "plain").merges == clip.merges
