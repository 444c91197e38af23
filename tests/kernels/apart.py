"""What to say where a kernel's answer is not the one wanted."""


def unlike(found, wanted):
    """What to say of whole numbers that differ."""
    places = (found != wanted).nonzero().tolist()
    pairs = [(found[tuple(at)].item(), wanted[tuple(at)].item()) for at in places[:4]]
    return f"{len(places)} of {list(found.shape)} differ, at {places[:4]}: {pairs}"


def assert_near(found, wanted, share, least=0.0):
    """Refuse a distance above a share of the norm."""
    moved = found.double() - wanted.double()
    far, allowed = float(moved.norm()), share * float(wanted.double().norm()) + least
    largest = float(moved.abs().max()) if moved.numel() else 0.0
    assert far <= allowed, f"{list(found.shape)}: {far} > {allowed}, largest difference {largest}"
