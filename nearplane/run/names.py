"""Names that users of other toolkits type, and the one name used inside. Imports nothing, for the command line's sake."""

ALIASES = {
    "wbits": "bits",
    "w_bit": "bits",
    "num_bits": "bits",
    "nbits": "bits",
    "groupsize": "group_size",
    "q_group_size": "group_size",
    "percdamp": "damp_percent",
    "dampening_frac": "damp_percent",
    "a_bits": "act_bits",
    "abits": "act_bits",
    "nsample": "nsamples",
    "num_calibration_samples": "nsamples",
    "max_seq_length": "seqlen",
}
