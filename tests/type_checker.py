"""The check of types in the tests: beartype, for which an int is a float too."""

from beartype import BeartypeConf, beartype

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
