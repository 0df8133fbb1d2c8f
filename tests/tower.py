"""beartype as the tests use it: an int is welcome where a float is annotated (PEP 484's numeric tower)."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

beartype = _beartype(conf=BeartypeConf(is_pep484_tower=True))
