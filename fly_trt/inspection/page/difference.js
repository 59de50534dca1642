// Which tokens of two answers are not the other's: what a longest common subsequence leaves out.

const MOST_CELLS = 9_000_000;

/** Of two lists of token ids, the places that have no counterpart in the other one, as two Sets. */
export function differences(left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  let end = 0;
  const most = Math.min(left.length, right.length) - start;
  while (end < most && left[left.length - 1 - end] === right[right.length - 1 - end]) end += 1;
  const kept = commonPlaces(left.slice(start, left.length - end), right.slice(start, right.length - end));
  const others = (length, common) => {
    const places = new Set();
    for (let at = start; at < length - end; at += 1) if (!common.has(at - start)) places.add(at);
    return places;
  };
  return [others(left.length, kept[0]), others(right.length, kept[1])];
}

function commonPlaces(left, right) {
  const found = [new Set(), new Set()];
  const width = right.length + 1;
  if ((left.length + 1) * width > MOST_CELLS) return found; // too long to compare: all of it counts as different
  const lengths = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      lengths[at] = left[i] === right[j] ? lengths[at + width + 1] + 1 : Math.max(lengths[at + width], lengths[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < left.length && j < right.length; ) {
    if (left[i] === right[j]) {
      found[0].add(i++);
      found[1].add(j++);
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return found;
}
