"""The root of an examination of the machine."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class DoctorJob:
    """What is examined, and how it is told."""

    measure: bool = True  # time a matrix product and an all-reduce too, some seconds
    json: bool = False  # print one JSON object instead of lines; also: --json
