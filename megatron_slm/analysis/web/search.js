/* Search of the tokens of a selection page. */

/** Find all occurrences, as ranges of tokens. */
function search() {
  const wanted = byId("search").value.toLowerCase();
  state.matches = [];
  state.match = -1;
  if (wanted) {
    const folded = foldedText();
    for (let at = folded.text.indexOf(wanted); at >= 0; at = folded.text.indexOf(wanted, at + wanted.length)) {
      state.matches.push([tokenAt(folded.offsets, at), tokenAt(folded.offsets, at + wanted.length - 1) + 1]);
    }
  }
  if (state.matches.length) go(1);
  else drawMatches();
}

let folded = null;

/**
 * Return the text in lower case, without the marks of partial characters, and the offset of each token in it.
 * Newlines, which cannot be searched for, separate the texts of the input.
 */
function foldedText() {
  if (folded) return folded;
  const offsets = new Uint32Array(shown.length), parts = [], later = new Set(starts.slice(1));
  let length = 0;
  data.shown.forEach((each, token) => {
    const separator = later.has(token) ? "\n" : "", part = each.toLowerCase();
    offsets[token] = length + separator.length;
    length = offsets[token] + part.length;
    parts.push(separator, part);
  });
  folded = { text: parts.join(""), offsets };
  return folded;
}

function tokenAt(offsets, offset) {
  let low = 0, high = offsets.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (offsets[middle] <= offset) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Move to the next or previous match. */
function go(direction) {
  const total = state.matches.length;
  if (!total) return;
  state.match = (state.match + direction + total) % total;
  const block = blocks[blockOf[state.matches[state.match][0]]];
  expand(block);
  reveal(block.tokens[state.matches[state.match][0] - block.start]);
  drawMatches();
}

function drawMatches() {
  const total = state.matches.length, wanted = byId("search").value;
  byId("matches").textContent = !wanted ? "" : total ? `${count(state.match + 1)} of ${count(total)}` : "not found";
  paintAll();
}
