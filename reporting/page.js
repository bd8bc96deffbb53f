// Sort a table by a click on a heading; show only chosen methods, and rows and pictures that have the text.
const text = document.querySelector('input'), buttons = [...document.querySelectorAll('.bar button')];

function filter() {
  const chosen = buttons.filter(button => button.ariaPressed === 'true').map(button => button.dataset.method);
  const words = text.value.toLowerCase().split(/\s+/);
  for (const part of document.querySelectorAll('tr[data-method], figure[data-method], g[data-method]')) {
    const content = part.matches('g') ? null : part.textContent.toLowerCase();
    const hidden = chosen.length && !chosen.includes(part.dataset.method);
    part.classList.toggle('off', hidden || content !== null && !words.every(word => content.includes(word)));
  }
}

function sort(heading) {
  const body = heading.closest('table').tBodies[0], up = heading.ariaSort !== 'ascending';
  const value = row => row.cells[heading.cellIndex].textContent;
  for (const other of heading.parentNode.cells) other.ariaSort = 'none';
  heading.ariaSort = up ? 'ascending' : 'descending';
  body.append(...[...body.rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)], [x, y] = [parseFloat(a), parseFloat(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || (up ? 1 : -1) * a.localeCompare(b);
    return (up ? 1 : -1) * (x - y);
  }));
}

text.hidden = false;
text.oninput = filter;
for (const button of buttons) button.onclick = () => {
  button.ariaPressed = button.ariaPressed !== 'true';
  filter();
};
for (const heading of document.querySelectorAll('thead th')) {
  heading.tabIndex = 0;
  heading.onclick = () => sort(heading);
  heading.onkeydown = event => { if (event.key === 'Enter') sort(heading); };
}
