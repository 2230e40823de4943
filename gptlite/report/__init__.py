"""What a run or study left behind, as figures and one self-contained page. No torch."""
