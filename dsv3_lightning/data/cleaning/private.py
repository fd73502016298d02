"""Masks for e-mail addresses and public IPv4 addresses, as in FineWeb; equal addresses get equal masks."""

import ipaddress
import re
import zlib

# The lookbehind makes the search linear: it begins at the first character of a word only.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)
IPV4 = re.compile(r"(?<![\d.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\d)")
EMAILS = ("email@example.com", "firstname.lastname@example.org")
ADDRESSES = tuple(f"192.0.2.{number}" for number in range(1, 7))  # reserved for documentation (RFC 5737)


def mask(text: str) -> tuple[str, int]:
    """The text with its addresses masked, and their number. Private and reserved IPv4 addresses stay.

    >>> mask("Write to ann@site.org, not to 10.0.0.1 or 8.8.8.8.")[1]
    2
    """
    emails = addresses = 0
    if "@" in text:
        text, emails = EMAIL.subn(lambda found: EMAILS[chosen(found[0], len(EMAILS))], text)
    if text.count(".") >= 3:
        masked = []

        def masked_address(found: "re.Match[str]") -> str:
            if not is_public(found[0]):
                return found[0]
            masked.append(found[0])
            return ADDRESSES[chosen(found[0], len(ADDRESSES))]

        text, addresses = IPV4.sub(masked_address, text), len(masked)
    return text, emails + addresses


def chosen(match: str, count: int) -> int:
    return zlib.crc32(match.encode()) % count


def is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:  # 300.1.1.1, or leading zeros
        return False
