"""Licences as SPDX expressions: read from package metadata or a licence text, compared with an allow-list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.message import Message
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

PERMISSIVE = (
    "MIT", "MIT-0", "MIT-CMU", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "Unlicense",
    "CC0-1.0", "PSF-2.0", "Python-2.0", "HPND", "BSL-1.0", "UPL-1.0",
)  # fmt: skip

_CLASSIFIERS = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.0-or-later",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
}
_ALIASES = {
    "mit license": "MIT", "the mit license": "MIT", "the mit license (mit)": "MIT", "expat": "MIT",
    "apache 2.0": "Apache-2.0", "apache-2": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache2": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache license version 2.0": "Apache-2.0", "apache": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0", "apache 2": "Apache-2.0",
    "bsd": "BSD-3-Clause", "bsd license": "BSD-3-Clause", "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause", "new bsd": "BSD-3-Clause",
    "modified bsd license": "BSD-3-Clause", "bsd 2-clause": "BSD-2-Clause", "psf": "PSF-2.0", "psfl": "PSF-2.0",
    "apache software license": "Apache-2.0", "bsd-3": "BSD-3-Clause",
    "mpl 2.0": "MPL-2.0", "gplv3": "GPL-3.0-only", "gpl v3": "GPL-3.0-only",
}  # fmt: skip
_TEXTS = (
    (r"Permission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
    (r"Apache License\s+Version 2\.0", "Apache-2.0"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE", "AGPL-3.0-only"),
    (r"GNU LESSER GENERAL PUBLIC LICENSE", "LGPL-3.0-only"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "GPL-3.0-only"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 2", "GPL-2.0-only"),
    (r"Mozilla Public License,? [Vv]ersion 2\.0", "MPL-2.0"),
    (r"Redistribution and use in source and binary forms[\s\S]*[Nn]either the name", "BSD-3-Clause"),
    (r"Redistribution and use in source and binary forms", "BSD-2-Clause"),
    (r"Permission to use, copy, modify, and(/or)? distribute this software", "ISC"),
    (r"This is free and unencumbered software released into the public domain", "Unlicense"),
)


def normalize_license(text: str) -> str:
    """Return an SPDX expression for a licence field, the field itself where it is short, "" where it is neither."""
    text = " ".join(text.split())
    if not text or text.upper() in ("UNKNOWN", "NONE", "NOASSERTION"):
        return ""
    if text.lower() in _ALIASES:
        return _ALIASES[text.lower()]
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return text if len(text) <= 60 else license_from_text(text)


def license_from_metadata(metadata: Message | Any) -> str:
    """Return the licence of a distribution from License-Expression, its classifiers or License, in this order."""
    if expression := metadata.get("License-Expression"):
        return normalize_license(str(expression))
    names = [str(c).split(" :: ")[-1] for c in metadata.get_all("Classifier") or () if str(c).startswith("License :: ")]
    # One without an SPDX identifier stays a condition, which no allow-list meets.
    known = sorted({_CLASSIFIERS.get(name, _custom(name)) for name in names if name != "OSI Approved"})
    stated = normalize_license(str(metadata.get("License") or ""))
    # "BSD License" does not say which: the License field may.
    if stated and (not known or (known == ["BSD-3-Clause"] and stated.startswith("BSD-"))):
        return stated
    # Several classifiers don't say that one may choose between them; only an expression does.
    return " AND ".join(known)


def _custom(name: str) -> str:
    return "LicenseRef-" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def home_pages_from_metadata(metadata: Message | Any) -> str:
    """Return the addresses of a distribution's Home-page and Project-URL fields, with blanks between."""
    urls = [str(metadata.get("Home-page") or "")]
    urls += [str(entry).partition(",")[2].strip() for entry in metadata.get_all("Project-URL") or ()]
    return " ".join(dict.fromkeys(url for url in urls if url.startswith("http")))


def license_from_text(text: str) -> str:
    """Return the SPDX identifier of a licence file's text, "" where it is not one of the usual texts."""
    return next((spdx for pattern, spdx in _TEXTS if re.search(pattern, text[:20_000])), "")


def allow_list(text: str) -> tuple[str, ...]:
    """Parse "MIT,Apache-2.0"; `permissive` stands for PERMISSIVE."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    licenses = [spdx for name in names for spdx in (PERMISSIVE if name == "permissive" else (name,))]
    return tuple(dict.fromkeys(licenses))


def license_allowed(expression: str, allowed: Iterable[str]) -> bool:
    """Tell whether an SPDX expression can be met with the allowed licences: OR needs one side, AND both.

    An exception ("GPL-2.0-only WITH Classpath-exception-2.0") counts as its licence.
    """
    permitted = {name.lower() for name in allowed}
    tokens = re.findall(r"[()]|[^\s()]+", expression)
    if expression.lower() in permitted:
        return True
    value, rest = _any_of(tokens, permitted)
    return value and not rest


def _any_of(tokens: list[str], permitted: set[str]) -> tuple[bool, list[str]]:
    value, rest = _all_of(tokens, permitted)
    while rest and rest[0].upper() == "OR":
        right, rest = _all_of(rest[1:], permitted)
        value = value or right
    return value, rest


def _all_of(tokens: list[str], permitted: set[str]) -> tuple[bool, list[str]]:
    value, rest = _one(tokens, permitted)
    while rest and rest[0].upper() == "AND":
        right, rest = _one(rest[1:], permitted)
        value = value and right
    return value, rest


def _one(tokens: list[str], permitted: set[str]) -> tuple[bool, list[str]]:
    if not tokens:
        return False, []
    if tokens[0] == "(":
        value, rest = _any_of(tokens[1:], permitted)
        return value, rest[1:]
    rest = tokens[1:]
    if len(rest) >= 2 and rest[0].upper() == "WITH":
        rest = rest[2:]
    return tokens[0].lower() in permitted, rest
