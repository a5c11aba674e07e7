"""3,000 emoji and their names: pictures to train on that this project did not draw.

    python docs/emoji.py emoji                            # downloads 16 MB by npm; 3 seconds
    python docs/emoji.py emoji PICTURES.tgz NAMES.tgz     # from the same two packages, as files

This makes emoji/, for train.py --data, and emoji-heldout/ with 102 names that emoji/ lacks ("man
cook, medium skin tone"). Their words are all in emoji/. The pictures are Microsoft's (MIT)."""
import io, json, re, subprocess, sys, tarfile, tempfile, zlib  # noqa: E401, I001 - to stay short
from pathlib import Path

PACK = "npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0 --fetch-retries=0"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")       # U+1F3FB to U+1F3FF

def unpack(path):
    """Path of a .tgz -> {name: bytes}, in memory. ValueError if it is not a plain npm package."""
    gzip = zlib.decompressobj(wbits=31)
    data = gzip.decompress(Path(path).read_bytes(), 2 ** 26)             # at most 64 MB
    tar = tarfile.TarFile(fileobj=io.BytesIO(data))
    if not gzip.eof or not all(m.isreg() and re.fullmatch(r"package(/\w[\w.-]*)+", m.name)
                               for m in tar):                # no part of a name is ".."
        raise ValueError(f"{path} is cut off, too large, or holds more than plain files")
    return {m.name: data[m.offset_data:m.offset_data + m.size] for m in tar.getmembers()}

def main(folder, *archives):
    """Writes FOLDER and FOLDER-heldout. Flags, and second pictures of a name, are left out."""
    with tempfile.TemporaryDirectory() as tmp:
        if not archives:
            subprocess.run(PACK, shell=True, cwd=tmp, check=True, capture_output=True)
        files = {n: d for p in archives or Path(tmp).glob("*.tgz") for n, d in unpack(p).items()}
    plain = lambda emoji: re.sub("[\ufe0f\U0001f3fb-\U0001f3ff]", "", emoji)     # no modifiers
    names = {plain(emoji): e["name"] for emoji, e
             in json.loads(files["package/data-by-emoji.json"]).items() if e["group"] != "Flags"}
    train, heldout, out = {}, {}, {}                         # caption -> file; new file -> bytes
    for file in sorted(name for name in files if name.endswith(".webp")):
        emoji = "".join(chr(int(code, 16)) for code in re.split("[-_]", Path(file).stem))
        if name := names.get(plain(emoji)):                  # flags have none
            name = name.replace("#", "number sign").replace("*", "asterisk")
            tones = [k for k in range(5) if chr(0x1f3fb + k) in emoji]
            # OURS: of 5 in 9 man, woman or person names one tone is held out, by checksum
            held = tones == [zlib.crc32(name.encode()) % 9] and re.match("(wo)?man |person ", name)
            caption = ", ".join([name, *(f"{TONES[k]} skin tone" for k in tones)])
            (heldout if held else train).setdefault(caption, file)       # one picture a caption
    for root, side in (Path(folder), train), (Path(f"{Path(folder)}-heldout"), heldout):
        rows = [json.dumps({"file": Path(f).name, "caption": c}) + "\n" for c, f in side.items()]
        out.update({root / Path(f).name: files[f] for f in side.values()})
        out[root / "captions.jsonl"] = "".join(rows).encode()
        root.mkdir(parents=True, exist_ok=True)
        print(f"{root}: {len(side):,} pictures with captions")
    new = len([p.write_bytes(b) for p, b in out.items() if not p.is_file() or p.read_bytes() != b])
    print(f"files: {new} written, {len(out) - new} unchanged, {len(files) + 2 - len(out)} left out")

if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except Exception as error:                               # a broken archive can raise anything
        print(f"error: {error}; without npm or network, get the two files of `{PACK}` elsewhere: "
              "python docs/emoji.py FOLDER PICTURES.tgz NAMES.tgz", file=sys.stderr)
        sys.exit(2)
