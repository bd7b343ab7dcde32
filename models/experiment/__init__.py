"""An experiment: many trainings that answer what a pretraining bought.

plan         what is asked: methods, label ratios, seeds; and the trainings (cells) it takes
cases        what one fine-tuning scored on every case of the test split
statistics   intervals over patients and seeds, paired tests, Holm's correction
report       all cells' results as one answer
render       the report in Markdown and its cases as CSV
curve        the label-efficiency curve as SVG

Everything here is a pure function of its arguments: the service and the shell share it, and the
same results give the same report, byte for byte.
"""
