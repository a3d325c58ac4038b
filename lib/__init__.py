"""The small package behind the notebooks. Kept empty: importing `lib` must cost nothing."""
