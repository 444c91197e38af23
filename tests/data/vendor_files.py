"""Small recordings in formats of makers of amplifiers that MNE reads and does not write.

From the descriptions: Neuroscan CNT at paulbourke.net/dataformats/eeg, EGI's simple binary and MFF
(mffpy), CTF's and KIT's as MNE's readers document them.
"""

import struct
from datetime import datetime, timezone

import numpy as np


def write_egi(path, microvolts, rate, events=()):
    """Write EGI's simple binary, big-endian float32 [T][channels then event codes].

    Args:
        path: ends in `.egi` or `.raw`.
        microvolts: [C, T].
        rate: whole, in Hz.
        events: (sample, code of four letters).
    """
    codes = sorted({code for _, code in events})
    rows = np.zeros((len(microvolts) + len(codes), microvolts.shape[1]), ">f4")
    rows[: len(microvolts)] = microvolts
    for sample, code in events:
        rows[len(microvolts) + codes.index(code), sample] = 1
    header = struct.pack(">i6hi5h", 4, 2023, 2, 1, 1, 0, 0, 0, rate, len(microvolts), 0, 0, 0)
    header += struct.pack(">ih", microvolts.shape[1], len(codes)) + "".join(codes).encode()
    path.write_bytes(header + rows.T.tobytes())


def write_cnt(path, counts, rate, labels, events=()):
    """Write Neuroscan CNT of int32 counts [C, T], each a ten thousandth of 204.8 µV.

    Args:
        path: ends in `.cnt`.
        counts: [C, T] whole numbers.
        rate: whole, in Hz.
        labels: of the channels.
        events: (sample, number).
    """
    channels, samples = counts.shape
    start = 900 + 75 * channels
    table = start + 4 * counts.size
    setup = bytearray(900)
    setup[:12] = b"Version 3.0\0"
    setup[225:233], setup[235:243] = b"02/01/23", b"01:00:00"
    struct.pack_into("<H", setup, 370, channels)
    struct.pack_into("<H", setup, 376, rate)
    struct.pack_into("<i", setup, 864, samples)
    struct.pack_into("<i", setup, 886, table)
    content = bytes(setup)
    for number, label in enumerate(labels):
        electrode = bytearray(75)
        electrode[:10] = label.encode().ljust(10, b"\0")
        angle = 2 * np.pi * number / channels
        struct.pack_into("<2f", electrode, 19, 40 * np.cos(angle), 40 * np.sin(angle))
        struct.pack_into("<f", electrode, 59, 1e-4 * 204.8)
        struct.pack_into("<f", electrode, 71, 204.8)
        content += bytes(electrode)
    marks = b"".join(
        struct.pack("<HBcl", number, 0, b"\0", start + 4 * channels * (sample + 1))
        for sample, number in events
    )
    data = np.ascontiguousarray(counts.T, "<i4").tobytes()
    path.write_bytes(content + data + struct.pack("<Bll", 1, len(marks), 0) + marks)


def write_mff(path, microvolts, rate):
    """Write the MFF of EGI, of the smallest net that mffpy knows.

    Args:
        path: ends in `.mff`.
        microvolts: [C, T], C = 33, its reference included.
        rate: whole, in Hz.
    """
    import mffpy
    from mffpy.bin_writer import BinWriter

    writer = mffpy.Writer(str(path))
    writer.addxml("fileInfo", recordTime=datetime(2023, 2, 1, 1, 0, 0, 1, tzinfo=timezone.utc))
    writer.add_coordinates_and_sensor_layout("HydroCel GSN 32 1.0")
    content = BinWriter(rate)
    content.add_block(microvolts.astype(np.float32), offset_us=0)
    writer.addbin(content)
    writer.write()


def write_ctf(path, counts, rate, *, trials=3, gain=1e9, events=()):
    """Write a CTF folder of axial gradiometers and one reference: `.res4`, `.meg4`, markers.

    Args:
        path: ends in `.ds`.
        counts: [C, T] whole numbers; T divides by ``trials``.
        rate: in Hz.
        trials: blocks that the samples lie in.
        gain: counts per tesla.
        events: (sample, name).
    """
    path.mkdir()
    channels, samples = counts.shape
    block = samples // trials
    head = bytearray(1844)
    head[:8] = b"MEG42RS\0"
    head[778:1033] = b"01:00:00".ljust(255, b"\0")
    head[1033:1288] = b"01/02/2023".ljust(255, b"\0")
    struct.pack_into(">ih", head, 1288, block, channels + 1)
    struct.pack_into(">2dh", head, 1296, rate, samples / rate, trials)
    head[1712:1744] = b"S01".ljust(32, b"\0")
    names = [*(f"MLC{number + 11}-1609" for number in range(channels)), "BG1-1609"]
    content = bytes(head) + struct.pack(">h", 0) + b"".join(map(_padded, names))
    content += b"".join(_ctf_sensor(number, channels, gain) for number in range(channels + 1))
    content += struct.pack(">h", channels)
    for name in names[:-1]:  # first-order balancing, which is not in force
        content += _padded(name) + struct.pack(">iih", 0x47314252, 0, 1)
        content += _padded(names[-1], 31) + bytes(31 * 49) + struct.pack(">50d", 0.1, *[0.0] * 49)
    (path / f"{path.stem}.res4").write_bytes(content)
    whole = np.vstack([counts, counts.sum(0)])
    data = whole.reshape(channels + 1, trials, block).swapaxes(0, 1).astype(">i4")
    (path / f"{path.stem}.meg4").write_bytes(b"MEG41CP\0" + data.tobytes())
    if events:
        (path / "MarkerFile.mrk").write_text(_markers(events, block, rate))


def _padded(name, width=32):
    return name.encode().ljust(width, b"\0")


def _ctf_sensor(number, channels, gain):
    reference = number == channels
    angle = 2 * np.pi * number / channels
    x, y = 10 * np.cos(angle), 10 * np.sin(angle)
    coils = b"".join(
        struct.pack(">8dhihd", x, y, 8.0 + height, 0.0, 0.0, 0.0, 1.0, 0.0, 4, 0, 0, 2.5)
        for height in ([0.0] if reference else [0.0, 5.0])
    ).ljust(80 * 8, b"\0")
    kind, count = (0, 1) if reference else (5, 2)
    values = (kind, 0, 0, gain / 1e3, 1e3, 1.0, 0.0, count, 0, 0)
    return struct.pack(">hhidddd", *values[:7]) + struct.pack(">hhi", *values[7:]) + coils * 2


def _markers(events, block, rate):
    names = list(dict.fromkeys(name for _, name in events))
    lines = ["PATH OF DATASET:", "a.ds", "", "", "NUMBER OF MARKERS:", str(len(names)), "", ""]
    for number, name in enumerate(names):
        own = [sample for sample, other in events if other == name]
        lines += ["CLASSGROUPID:", "3", "NAME:", name, "COMMENT:", "", "COLOR:", "Red"]
        lines += ["EDITABLE:", "Yes", "CLASSID:", f"+{number + 1}"]
        lines += ["NUMBER OF SAMPLES:", str(len(own)), "LIST OF SAMPLES:"]
        lines += ["TRIAL NUMBER\t\tTIME FROM SYNC POINT (in seconds)"]
        lines += [f"{sample // block:+20d}\t\t\t{sample % block / rate:+.10f}" for sample in own]
        lines += ["", ""]
    return "\n".join(lines) + "\n"


def write_kit(path, counts, rate, *, gain=1e-9):
    """Write a continuous KIT file of axial gradiometers, int16 counts and gain 1.

    A count is 10 V / 2**16 times the gain.

    Args:
        path: ends in `.sqd` or `.con`.
        counts: [C, T] whole numbers.
        rate: in Hz.
        gain: tesla per volt.
    """
    channels, samples = counts.shape
    system = struct.pack("<3i", 2, 4, 300) + b"KIT".ljust(128, b"\0") + b"demo".ljust(128, b"\0")
    system += struct.pack("<i", channels) + bytes(256) + struct.pack("<2i", 1_675_213_200, 0)
    for kind in (0, 100, 0, 0):  # dewar, electronics, trigger, converter
        system += bytes(12) + struct.pack("<i", kind)
    system += bytes(4 * 29) + struct.pack("<d3i", 10.0, 0, 16, 16)
    sensors = b""
    for number in range(channels):
        angle = 360.0 * number / channels
        place = (0.1 * np.cos(np.radians(angle)), 0.1 * np.sin(np.radians(angle)), 0.1, 30.0, angle)
        sensors += struct.pack("<i5d", 2, *place).ljust(80, b"\0")
    parts = {
        1: (system, len(system), 1),
        4: (sensors, 80, channels),
        5: (np.tile([0.0, gain], channels).tobytes(), 16, channels),
        7: (struct.pack("<i", 0), 4, 1),
        8: (struct.pack("<id2i", 1, rate, 0, samples), 20, 1),
        9: (np.ascontiguousarray(counts.T, "<i2").tobytes(), 2 * channels, samples),
    }
    count, offset = 30, 16 * 30
    entries, content = [(0, 16, count, count)], b""
    for number in range(1, count):
        part, size, amount = parts.get(number, (b"", 0, 0))
        entries.append((offset + len(content), size, amount, amount))
        content += part
    directory = b"".join(struct.pack("<4i", *entry) for entry in entries)
    path.write_bytes(directory + content)
