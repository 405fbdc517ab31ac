"use strict";
const INDEX = {{ index }};
// Ranks as posterity.papers.search.rank does; `data` is what its index gives.
function searcher(data) {
  const stop = new Set(data.stop);
  function stem(word) {
    word = word.replaceAll("iz", "is");
    for (const step of data.steps)
      for (const [ending, other, pairs] of step) {
        if (!word.endsWith(ending)) continue;
        const left = word.slice(0, word.length - ending.length);
        if ((left.match(/[aeiouy][^aeiou]/g) || []).length >= pairs) { word = left + other; break; }
      }
    return word;
  }
  function split(text) {
    const plain = text.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "").replace(/['’]s?/g, "").replaceAll("%", " percent ");
    const found = [];
    for (const word of plain.match(/[a-z0-9]+(?:-[a-z0-9]+)*/g) || []) {
      const parts = word.split("-");
      found.push(...parts);
      if (parts.length > 1) found.push(parts.join(""));
    }
    return found.filter((word) => word.length > 1 && !/^[0-9]+$/.test(word) && !stop.has(word));
  }
  function apart(a, b) {
    let before = [], row = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i++) {
      const last = row;
      row = [i];
      for (let j = 1; j <= b.length; j++) {
        row.push(Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] !== b[j - 1])));
        if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
      }
      before = last;
    }
    return row[b.length];
  }
  const known = Object.keys(data.words);
  function roots(word) {
    const root = stem(word), found = new Map();
    for (const other of data.synonyms[root] || []) found.set(other, data.like);
    if (Object.hasOwn(data.scores, root)) found.set(root, 1);
    if (found.size) return found;
    let near = word.length > 2 ? known.filter((other) => other.startsWith(word)) : [];
    if (!near.length && word.length > 3) {
      const most = word.length < 8 ? 1 : 2;
      let least = most;
      for (const other of known) {
        if (Math.abs(other.length - word.length) > most) continue;
        const far = apart(word, other);
        if (far < least) { least = far; near = []; }
        if (far === least) near.push(other);
      }
    }
    for (const other of near) found.set(data.words[other], data.like);
    return found;
  }
  return function rank(text) {
    const total = data.papers.map(() => 0), firsts = new Map();
    for (const word of split(text)) if (!firsts.has(stem(word))) firsts.set(stem(word), word);
    for (const word of firsts.values()) {
      const best = new Map();
      for (const [root, share] of roots(word))
        for (const [number, score] of data.scores[root]) best.set(number, Math.max(best.get(number) || 0, share * score));
      for (const [number, score] of best) total[number] += score;
    }
    data.ready.forEach((ready, n) => { if (ready) total[n] *= data.boost; });
    const least = data.least * Math.max(...total);
    const name = text.trim().toLowerCase(), named = (n) => data.papers[n] === name;
    return total.map((score, n) => [n, score])
      .filter(([n, score]) => score > 0 && (score >= least || named(n)))
      .sort((a, b) => named(b[0]) - named(a[0]) || b[1] - a[1] || a[0] - b[0])
      .map(([n, score]) => [data.papers[n], score]);
  };
}
