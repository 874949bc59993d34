r"""120 answers to problems with a known gold answer, graded by hand, for the verifiers.

PAIRS holds (kind, gold, answer, whether a human grader who knows only the gold answer would call the answer
right). A unit or a currency beside the gold's number is right, another value, two values or a condition are
wrong. Where the two say the same in another notation, they are right, whether or not a verifier reads it.
The grades were written down before any verifier had seen the pairs.
"""
PAIRS = [
    ("int", "18", " 18 ", True), ("int", "72", "72.", True), ("int", "7", "+7", True),
    ("int", "27", "-27", False),

    ("money", "18", "\\$18.00", True), ("money", "18", "€18", True), ("money", "45", "£45", True),
    ("money", "18", "18 USD", True), ("money", "60", "60 dollars", True), ("money", "250", "$2.50", False),

    ("separators", "1234", "1{,}234", True), ("separators", "12500", "12\\,500", True),
    ("separators", "1000000", "1,000,000", True), ("separators", "1234", "1 234", True),
    ("separators", "11111100", "11,\\!111,\\!100", True), ("separators", "3125", "(3,125)", False),
    ("separators", "18", "1 8", False), ("separators", "3125", "3, 125", False),
    ("separators", "1234", "1.234", False),

    ("percent", "18", "18\\%", True), ("percent", "25", "25 percent", True), ("percent", "0.25", "25%", True),
    ("percent", "18", "0.18", False), ("percent", "50", "5%", False),

    ("units", "12", "12 \\text{ cm}^2", True), ("units", "12", "12\\ \\mathrm{cm}", True),
    ("units", "5", "5 kilometers", True), ("units", "150", "150 pounds", True),
    ("units", "24", "24 people", True), ("units", "90", "90^\\circ", True), ("units", "90", "90°", True),
    ("units", "12", "12 bananas", True), ("units", "2", "2 hours 30 minutes", False),
    ("units", "35", "3 cm 5 mm", False),

    ("fractions", "1/2", "\\frac12", True), ("fractions", "0.75", "\\dfrac{3}{4}", True),
    ("fractions", "-2/3", "-\\frac{2}{3}", True), ("fractions", "1/2", "2/4", True),
    ("fractions", "3/4", "4/3", False), ("fractions", "4", "\\frac{3}{4}", False),
    ("fractions", "1/3", "0.33", False),

    ("mixed", "5/2", "2\\frac{1}{2}", True), ("mixed", "2.5", "2 1/2", True),
    ("mixed", "-3/2", "-1\\frac{1}{2}", True), ("mixed", "21/2", "2\\frac{1}{2}", False),
    ("mixed", "11/2", "1 1/2", False),

    ("scientific", "1000000", "10^6", True), ("scientific", "3000", "3 \\times 10^3", True),
    ("scientific", "6", "10^6", False), ("scientific", "3", "2.5e3", False),

    ("equations", "18", "x = 18", True), ("equations", "7", "3 + 4 = 7", True),
    ("equations", "18", "2x = 18", False), ("equations", "18", "x > 18", False),
    ("equations", "5", "y \\neq 5", False),

    ("negative", "-5", "−5", True), ("negative", "-5", "－5", True), ("negative", "-5", "- 5", True),
    ("negative", "-5", "(-5)", True), ("negative", "5", "−5", False), ("negative", "5", "-$5", False),

    ("decimals", "0.5", ".5", True), ("decimals", "3.14", "3.1416", False),
    ("decimals", "0.5", "0.05", False),

    ("boxed", "18", "\\boxed 18", True), ("boxed", "18", "$\\boxed{18}$", True),
    ("boxed", "3/4", "\\boxed{\\frac{3}{4}}", True), ("boxed", "18", "\\boxed{180}", False),
    ("boxed", "18", "\\boxed{18} is wrong, so \\boxed{20}", False),

    ("LaTeX", "18", "\\(18\\)", True), ("LaTeX", "18", "\\[18\\]", True), ("LaTeX", "18", "**18**", True),
    ("LaTeX", "18", "$18$", True), ("LaTeX", "18", "\\mathbf{18}", True),
    ("LaTeX", "18", "\\left(18\\right)", True), ("LaTeX", "2\\sqrt{3}", "2 \\sqrt{3}", True),
    ("LaTeX", "2\\sqrt{3}", "2\\sqrt3", True), ("LaTeX", "\\pi/2", "\\pi", False),

    ("intervals", "[1,2]", "[1, 2]", True), ("intervals", "[2,5)", "\\left[2,5\\right)", True),
    ("intervals", "(1,2)", "[1,2]", False), ("intervals", "(1,2)", "(1,2]", False),
    ("intervals", "(-\\infty, 3)", "(-\\infty,3]", False),

    ("sets", "\\{1,2\\}", "\\{1, 2\\}", True), ("sets", "\\{1,2\\}", "\\{2,1\\}", True),
    ("sets", "\\{1,2\\}", "(1,2)", False),

    ("tuples", "(3,4)", "(3, 4)", True), ("tuples", "(3,4)", "(4,3)", False),
    ("tuples", "(3,4)", "34", False),

    ("words", "Tuesday", "tuesday", True), ("words", "18", "eighteen", True),
    ("words", "18", "The answer is 18", True), ("words", "18", "less than 18", False),

    ("Chinese", "18", "18元", True), ("Chinese", "18", "18。", True), ("Chinese", "18", "１８", True),
    ("Chinese", "-5", "－５", True), ("Chinese", "12", "12厘米", True), ("Chinese", "18", "答案是18", True),
    ("Chinese", "18", "18万", False),

    ("choices", "B", "(B)", True), ("choices", "B", "\\text{B}", True), ("choices", "B", "A or B", False),

    ("hacks", "18", "18\\text{ or 19}", False), ("hacks", "18", "\\text{17}18", False),
    ("hacks", "18", "\\text{not }18", False), ("hacks", "18", "17, 18", False),
    ("hacks", "18", "1day8", False), ("hacks", "18", "18 or 19", False), ("hacks", "18", "{1}8\\%9", False),

    ("time", "3:30", "3:30", True), ("time", "30", "3:30", False),

    ("ratio", "3:4", "3 : 4", True), ("ratio", "3:4", "4:3", False), ("ratio", "34", "3:4", False),

    ("leading zeros", "4", "004", True), ("leading zeros", "4", "400", False),

    ("plus-minus", "\\pm 3", "\\pm3", True), ("plus-minus", "3", "\\pm 3", False),
    ("plus-minus", "\\pm 3", "3", False),
]
