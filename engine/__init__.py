"""The training engine: data contract, SPADE loop, students, curricula, the drop-in loss."""
