"""Numbers of the Ettin paper that several tests compare with."""

#: Paper Table 1, with the head: encoder and decoder alike.
PARAMETERS = {
    "17m": 16_913_600,
    "32m": 32_081_344,
    "68m": 68_457_664,
    "150m": 149_655_232,
    "400m": 395_881_664,
    "1b": 1_031_314_112,
}
