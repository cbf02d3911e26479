"""What steers a round: draft lengths, the times they follow, relaxed acceptance."""
