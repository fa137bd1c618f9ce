"""In which order a repository's files are read.

`depth`: shallow folders first, then by path (the paper). `imports`: a file comes after the files that it imports; files
that import each other (a cycle) stay together, by depth.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def depth_key(path: str) -> tuple[int, str]:
    """Return the sort key of the paper's order."""
    return path.count("/"), path


def order_by_depth(paths: Sequence[str]) -> list[str]:
    """Return the paths, shallow folders first, then alphabetically."""
    return sorted(paths, key=depth_key)


def order_by_imports(paths: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths so that each comes after what it needs, cycles aside; among the free ones, by depth.

    needs: for a path, the paths that it imports (those not among `paths` are ignored).
    """
    ordered = order_by_depth(paths)
    component_of = _components(ordered, needs)
    members: dict[int, list[str]] = {}
    for path in ordered:
        members.setdefault(component_of[path], []).append(path)
    waits = {
        number: {component_of[n] for path in group for n in needs.get(path, ()) if n in component_of} - {number}
        for number, group in members.items()
    }
    return [path for number in _release(members, waits) for path in members[number]]


def _release(members: Mapping[int, list[str]], waits: dict[int, set[int]]) -> list[int]:
    """Kahn's algorithm; the free component with the shallowest first file goes first."""
    wanted_by: dict[int, list[int]] = {number: [] for number in members}
    for number, others in waits.items():
        for other in others:
            wanted_by[other].append(number)
    free = [(depth_key(members[number][0]), number) for number, others in waits.items() if not others]
    heapq.heapify(free)
    released: list[int] = []
    while free:
        _, number = heapq.heappop(free)
        released.append(number)
        for waiting in wanted_by[number]:
            waits[waiting].discard(number)
            if not waits[waiting]:
                heapq.heappush(free, (depth_key(members[waiting][0]), waiting))
    return released


def _components(paths: Sequence[str], needs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the number of each path's strongly connected component (Tarjan 1972, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    component_of: dict[str, int] = {}
    stack: list[str] = []
    known = set(paths)
    for start in paths:
        if start in index:
            continue
        work = [(start, iter([n for n in needs.get(start, ()) if n in known]))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            path, remaining = work[-1]
            for other in remaining:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter([n for n in needs.get(other, ()) if n in known])))
                    break
                if other not in component_of:
                    low[path] = min(low[path], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[path])
                if low[path] == index[path]:
                    _close(path, stack, component_of, index[path])
    return component_of


def _close(root: str, stack: list[str], component_of: dict[str, int], number: int) -> None:
    while True:
        member = stack.pop()
        component_of[member] = number
        if member == root:
            return
